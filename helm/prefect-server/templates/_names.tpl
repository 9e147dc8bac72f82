{{/* Names and labels. Components: api, services, migrations, database, redis. */}}

{{/* The objects' names begin with it: a label of DNS, to which the longest component can be added. */}}
{{- define "prefect-server.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- else -}}
{{- $name = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- regexReplaceAll "-+$" ($name | replace "." "-" | trunc 50) "" -}}
{{- end -}}

{{/* The labels that select a component's pods: (list root component). They never change. */}}
{{- define "prefect-server.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object: (list root component). */}}
{{- define "prefect-server.labels" -}}
{{- $root := index . 0 -}}
{{ include "prefect-server.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: prefect
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{/* A pod's labels: (list root component). Without versions: a chart that says no more than that it is newer
     starts no database anew. */}}
{{- define "prefect-server.podLabels" -}}
{{ include "prefect-server.selector" . }}
app.kubernetes.io/part-of: prefect
{{- end -}}

{{/* `metadata` of an object: (dict "root" "component" "name" "labels" "annotations"). */}}
{{- define "prefect-server.metadata" -}}
{{- $own := include "prefect-server.filled" (list .root (printf "%s.annotations" (.path | default .component)) (.annotations | default dict)) | fromYaml -}}
{{- $annotations := mergeOverwrite (include "prefect-server.filled" (list .root "commonAnnotations" .root.Values.commonAnnotations) | fromYaml) $own -}}
name: {{ .name | default (printf "%s-%s" (include "prefect-server.fullname" .root) .component) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "prefect-server.mergedLabels" (list .root (include "prefect-server.labels" (list .root .component) | fromYaml) (printf "%s.labels" (.path | default .component)) .labels) | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* An image's whole name; the digest wins over the tag. */}}
{{- define "prefect-server.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}

{{- define "prefect-server.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "prefect-server.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The Secrets: the one that the person names, else the chart's own. */}}
{{- define "prefect-server.authSecret" -}}
{{- default (printf "%s-auth" (include "prefect-server.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "prefect-server.databaseSecret" -}}
{{- default (printf "%s-database" (include "prefect-server.fullname" .)) .Values.database.bundled.existingSecret -}}
{{- end -}}

{{- define "prefect-server.redisSecret" -}}
{{- default (printf "%s-redis" (include "prefect-server.fullname" .)) .Values.redis.bundled.existingSecret -}}
{{- end -}}

{{/* Whether processes of the server share a Redis. */}}
{{- define "prefect-server.redis" -}}
{{- if or .Values.redis.bundled.enabled .Values.redis.external.existingSecret -}}true{{- end -}}
{{- end -}}
