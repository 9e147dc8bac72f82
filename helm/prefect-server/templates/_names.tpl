{{/* Names and labels. Components: api, services, migrations, database, pgbouncer, redis, oidc, backup, test. */}}

{{/* Prefix of all objects' names. Cut to 50 characters, so that it stays a DNS label with the longest component appended. */}}
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

{{/* Labels that select a component's pods: (list root component). They never change, as selectors are immutable. */}}
{{- define "prefect-server.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* The chart's labels of an object: (list root component). */}}
{{- define "prefect-server.labels" -}}
{{- $root := index . 0 -}}
{{ include "prefect-server.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: prefect
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{/* The chart's labels of a pod: (list root component). They have no versions, so that a new chart version alone does not
     restart the database. */}}
{{- define "prefect-server.podLabels" -}}
{{ include "prefect-server.selector" . }}
app.kubernetes.io/part-of: prefect
{{- end -}}

{{/* `metadata` of an object: (dict "root" "component" "name" "labels" "annotations" "path"). `path` is the key of the labels
     and annotations in the values, for error messages. */}}
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

{{/* Name of a Job of this release revision: (list root purpose). It is a label of the Job's pods, so it has at most 63
     characters, with any revision number. */}}
{{- define "prefect-server.jobOfRevision" -}}
{{- $suffix := printf "-%s-%d" (index . 1) (index . 0).Release.Revision -}}
{{- printf "%s%s" (regexReplaceAll "-+$" (include "prefect-server.fullname" (index . 0) | trunc (sub 63 (len $suffix) | int)) "") $suffix -}}
{{- end -}}

{{/* Full name of an image. The digest wins over the tag. */}}
{{- define "prefect-server.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}

{{- define "prefect-server.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "prefect-server.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Names of the Secrets: the existing Secret from the values, else the generated one. */}}
{{- define "prefect-server.authSecret" -}}
{{- default (printf "%s-auth" (include "prefect-server.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{/* Empty if Prefect keeps the key in its database. A chart that is rendered without a cluster, as by Argo CD, would have
     another key each time, and there the API's password is an existing Secret. */}}
{{- define "prefect-server.encryptionKeySecret" -}}
{{- $generated := printf "%s-encryption-key" (include "prefect-server.fullname" .) -}}
{{- if .Values.encryptionKey.existingSecret -}}
{{- .Values.encryptionKey.existingSecret -}}
{{- else if or (and .Values.auth.enabled (not .Values.auth.existingSecret)) (lookup "v1" "Secret" .Release.Namespace $generated) -}}
{{- $generated -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.databaseSecret" -}}
{{- if eq (include "prefect-server.databaseMode" .) "cnpg" -}}
{{- include "prefect-server.cnpgName" . -}}-app
{{- else -}}
{{- default (printf "%s-database" (include "prefect-server.fullname" .)) .Values.database.bundled.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Host of the database, unless it is external. With cnpg it is the operator's Service, which leads to the primary. */}}
{{- define "prefect-server.databaseHost" -}}
{{- if eq (include "prefect-server.databaseMode" .) "cnpg" -}}
{{- include "prefect-server.cnpgName" . -}}-rw
{{- else -}}
{{- include "prefect-server.fullname" . -}}-database
{{- end -}}
{{- end -}}

{{- define "prefect-server.redisSecret" -}}
{{- default (printf "%s-redis" (include "prefect-server.fullname" .)) .Values.redis.bundled.existingSecret -}}
{{- end -}}

{{/* Mode of the database: bundled, external or cnpg. */}}
{{- define "prefect-server.databaseMode" -}}
{{- .Values.database.mode | default (ternary "bundled" "external" .Values.database.bundled.enabled) -}}
{{- end -}}

{{/* "true" if the server's processes share a Redis. */}}
{{- define "prefect-server.redis" -}}
{{- if or .Values.redis.bundled.enabled .Values.redis.external.existingSecret -}}true{{- end -}}
{{- end -}}
