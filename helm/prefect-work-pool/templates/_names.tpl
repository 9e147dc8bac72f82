{{/* Names and labels. Components: worker, runs, results, sync, drift, reconciler. */}}

{{/* Prefix of all objects' names. Cut to 50 characters, so that it stays a DNS label with the longest component appended. */}}
{{- define "prefect-work-pool.fullname" -}}
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
{{- define "prefect-work-pool.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* The chart's labels of an object: (list root component). */}}
{{- define "prefect-work-pool.labels" -}}
{{- $root := index . 0 -}}
{{ include "prefect-work-pool.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: prefect
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{/* The chart's labels of a pod: (list root component). They have no versions, so that a new chart version alone restarts
     no pod. */}}
{{- define "prefect-work-pool.podLabels" -}}
{{ include "prefect-work-pool.selector" . }}
app.kubernetes.io/part-of: prefect
{{- end -}}

{{/* Namespace of the runs. */}}
{{- define "prefect-work-pool.runsNamespace" -}}
{{- include "prefect-work-pool.line" (list . "runs.namespace" .Values.runs.namespace) | default .Release.Namespace -}}
{{- end -}}

{{/* Namespaces that may have pods of runs, as a YAML list: that of the runs, and earlier ones. */}}
{{- define "prefect-work-pool.runsNamespaces" -}}
{{- $names := list (include "prefect-work-pool.runsNamespace" .) -}}
{{- range $index, $name := .Values.runs.formerNamespaces -}}
{{- $names = append $names (include "prefect-work-pool.line" (list $ (printf "runs.formerNamespaces[%d]" $index) $name)) -}}
{{- end -}}
{{- uniq $names | toYaml -}}
{{- end -}}

{{/* Namespace of the runs as an argument of a component. The manifests for kubectl name no namespace. */}}
{{- define "prefect-work-pool.runsNamespaceArgument" -}}
{{- ternary (include "prefect-work-pool.runsNamespace" .) "$(NAMESPACE)" (ne .Values.runs.namespace "") -}}
{{- end -}}

{{/* URL of the Prefect API. A Service without its namespace is in the release's namespace. Runs in another namespace need the
     longer name. */}}
{{- define "prefect-work-pool.apiUrl" -}}
{{- $url := include "prefect-work-pool.line" (list . "api.url" .Values.api.url) -}}
{{- $isElsewhere := ne (include "prefect-work-pool.runsNamespace" .) .Release.Namespace -}}
{{- if and $isElsewhere (not (hasPrefix "localhost" (urlParse $url).host)) -}}
{{- $url = regexReplaceAll "^(https?://[A-Za-z0-9-]+)([:/]|$)" $url (printf "${1}.%s${2}" .Release.Namespace) -}}
{{- end -}}
{{- $url -}}
{{- end -}}

{{/* `metadata` of an object: (dict "root" "component" "name" "namespace" "labels" "annotations" "path"). `path` is the key of the
     labels and annotations in the values, for error messages. */}}
{{- define "prefect-work-pool.metadata" -}}
{{- $own := include "prefect-work-pool.filled" (list .root (printf "%s.annotations" (.path | default .component)) (.annotations | default dict)) | fromYaml -}}
{{- $annotations := mergeOverwrite (include "prefect-work-pool.filled" (list .root "commonAnnotations" .root.Values.commonAnnotations) | fromYaml) $own -}}
name: {{ .name | default (printf "%s-%s" (include "prefect-work-pool.fullname" .root) .component) }}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels:
  {{- include "prefect-work-pool.mergedLabels" (list .root (include "prefect-work-pool.labels" (list .root .component) | fromYaml) (printf "%s.labels" (.path | default .component)) .labels) | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Name of cluster-wide objects. Other namespaces may have a release of the same name. */}}
{{- define "prefect-work-pool.clusterRoleName" -}}
{{- printf "%s:%s" .Release.Namespace (include "prefect-work-pool.fullname" .) -}}
{{- end -}}

{{/* `metadata` of a cluster-wide object. A label has the release's namespace, to find and delete the object. */}}
{{- define "prefect-work-pool.clusterMetadata" -}}
{{- $labels := include "prefect-work-pool.labels" (list . "reconciler") | fromYaml -}}
{{- $_ := set $labels "prefect.io/release-namespace" .Release.Namespace -}}
name: {{ include "prefect-work-pool.clusterRoleName" . | quote }}
labels:
  {{- include "prefect-work-pool.mergedLabels" (list . $labels "clusterRole.labels" dict) | nindent 2 }}
{{- with include "prefect-work-pool.filled" (list . "commonAnnotations" .Values.commonAnnotations) | fromYaml }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Full name of an image. The digest wins over the tag. */}}
{{- define "prefect-work-pool.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}

{{/* Name of a component's service account: (list root component). */}}
{{- define "prefect-work-pool.serviceAccountName" -}}
{{- $account := (index (index . 0).Values (index . 1)).serviceAccount -}}
{{- if $account.create -}}
{{- default (printf "%s-%s" (include "prefect-work-pool.fullname" (index . 0)) (index . 1)) $account.name -}}
{{- else -}}
{{- $account.name -}}
{{- end -}}
{{- end -}}

{{/* Image of runs: runs.image if it is set, else the release's image. */}}
{{- define "prefect-work-pool.runsImage" -}}
{{- $own := .Values.runs.image -}}
{{- if or $own.tag $own.digest -}}
{{- include "prefect-work-pool.image" (dict "repository" ($own.repository | default .Values.image.repository) "tag" $own.tag "digest" $own.digest) -}}
{{- else -}}
{{- include "prefect-work-pool.image" .Values.image -}}
{{- end -}}
{{- end -}}

{{/* Claim with the results of runs: the existing claim from the values, else that of the StatefulSet's pod. */}}
{{- define "prefect-work-pool.resultsClaim" -}}
{{- .Values.runs.results.volume.existingClaim | default (printf "results-%s-0" (include "prefect-work-pool.statefulSet" (list . "results"))) -}}
{{- end -}}

{{/* Secret with the master key of signed results. Empty: results are not signed. Without a storage there are none to sign, unless
     the values name a Secret: the pool may be that of another release. */}}
{{- define "prefect-work-pool.signingSecret" -}}
{{- with .Values.runs.results -}}
{{- if and .signing.enabled (or .signing.existingSecret (ne .storage "none")) -}}
{{- .signing.existingSecret | default (printf "%s-results-signing" (include "prefect-work-pool.fullname" $)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Pod values of a component, with templates rendered: (list root component). The component's `pod` wins over the top-level
     `pod`. Runs take no top-level sidecars. */}}
{{- define "prefect-work-pool.podValues" -}}
{{- $root := index . 0 -}}
{{- $all := include "prefect-work-pool.filled" (list $root "pod" $root.Values.pod) | fromYaml -}}
{{- $own := include "prefect-work-pool.filled" (list $root (printf "%s.pod" (index . 1)) (index $root.Values (index . 1)).pod) | fromYaml -}}
{{- if eq (index . 1) "runs" -}}{{- $all = omit $all "sidecars" -}}{{- end -}}
{{- $pod := mergeOverwrite $all $own -}}
{{- include "prefect-work-pool.completeContainers" $pod -}}
{{- toYaml $pod -}}
{{- end -}}

{{/* Complete the containers in a pod's values, in place. A user's container without a securityContext gets that of the chart's
     containers. Numbers become text where Kubernetes needs text. */}}
{{- define "prefect-work-pool.completeContainers" -}}
{{- $security := .containerSecurityContext -}}
{{- range $container := concat (.initContainers | default list) (.sidecars | default list) -}}
{{- if and $security (not .securityContext) -}}{{- $_ := set . "securityContext" $security -}}{{- end -}}
{{- range .env -}}
{{- if hasKey . "value" -}}{{- $_ := set . "value" (include "prefect-work-pool.text" .value) -}}{{- end -}}
{{- end -}}
{{- with .resources -}}{{- $_ := set $container "resources" (include "prefect-work-pool.resources" . | fromYaml) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Name of the Secret with the credentials by role. Empty: all components have the one credential, or none. */}}
{{- define "prefect-work-pool.rolesSecret" -}}
{{- with .Values.api.auth -}}
{{- if .existingSecret -}}{{- .rolesSecret -}}{{- end -}}
{{- end -}}
{{- end -}}
