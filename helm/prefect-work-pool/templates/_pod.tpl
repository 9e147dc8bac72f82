{{/* Pod template of worker, sync, drift and reconciler: (dict "root" "component" "containers" "serviceAccount" "token" "volumes"
     "annotations"). `containers` is rendered text. `token` mounts the API token of Kubernetes. */}}
{{- define "prefect-work-pool.pod" -}}
{{- $root := .root -}}
{{- $pod := include "prefect-work-pool.podValues" (list $root .component) | fromYaml -}}
metadata:
  labels:
    {{- include "prefect-work-pool.mergedLabels" (list $root (include "prefect-work-pool.podLabels" (list $root .component) | fromYaml) (printf "%s.pod.labels" .component) $pod.labels) | nindent 4 }}
  {{- with mergeOverwrite (include "prefect-work-pool.filled" (list $root "commonAnnotations" $root.Values.commonAnnotations) | fromYaml) ($pod.annotations | default dict) (.annotations | default dict) }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ .serviceAccount | quote }}
  automountServiceAccountToken: {{ .token }}
  {{- if hasKey (index $root.Values .component) "terminationGracePeriodSeconds" }}
  terminationGracePeriodSeconds: {{ int64 (index $root.Values .component).terminationGracePeriodSeconds }}
  {{- end }}
  {{- include "prefect-work-pool.placement" (list $root $pod) | nindent 2 }}
  {{- .containers | nindent 2 }}
  volumes:
    {{- include "prefect-work-pool.volumes" (list (concat (.volumes | default list) (include "prefect-work-pool.caVolumes" $root | fromYamlArray)) $pod) | nindent 4 }}
{{- end -}}

{{/* Containers of worker, sync, drift and reconciler: (dict "root" "component" "pod" "mounts" "args" "more"). `more` is the
     rendered text of the main container's other keys. */}}
{{- define "prefect-work-pool.containers" -}}
{{- with .pod.initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: {{ .component }}
    {{- include "prefect-work-pool.container" (list .root .component .pod) | nindent 4 }}
    args: {{- toYaml .args | nindent 6 }}
    {{- .more | trim | nindent 4 }}
    volumeMounts:
      {{- include "prefect-work-pool.mounts" (list (concat (.mounts | default list) (include "prefect-work-pool.caMounts" .root | fromYamlArray)) .pod) | nindent 6 }}
  {{- with .pod.sidecars }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Probes of a container: (list (the component's values) (the handler of all probes)). */}}
{{- define "prefect-work-pool.probes" -}}
{{- range $name := list "startupProbe" "livenessProbe" "readinessProbe" }}
{{ $name }}: {{- mergeOverwrite (deepCopy (index $ 1)) (index (index $ 0) $name) | toYaml | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Keys that the chart's containers share: (list root component pod). */}}
{{- define "prefect-work-pool.container" -}}
{{- $root := index . 0 -}}
image: {{ include "prefect-work-pool.image" $root.Values.image | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
{{ include "prefect-work-pool.containerEnv" . }}
resources: {{- include "prefect-work-pool.resources" (index $root.Values (index . 1)).resources | nindent 2 }}
securityContext: {{- toYaml (index . 2).containerSecurityContext | nindent 2 }}
{{- end -}}

{{/* Volumes of a pod, and mounts of its main container: (list (the chart's own, without /tmp) pod). The chart adds /tmp. A
     volume or mount of the user with the same name or path replaces it. */}}
{{- define "prefect-work-pool.volumes" -}}
{{- $own := prepend (index . 0 | default list) (dict "name" "tmp" "emptyDir" (dict "sizeLimit" (index . 1).tmpSizeLimit)) -}}
{{- include "prefect-work-pool.byKey" (list "name" $own (index . 1).volumes) -}}
{{- end -}}

{{- define "prefect-work-pool.mounts" -}}
{{- $own := prepend (index . 0 | default list) (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- include "prefect-work-pool.byKey" (list "mountPath" $own (index . 1).volumeMounts) -}}
{{- end -}}

{{/* Placement and security context of a pod: (list root pod). */}}
{{- define "prefect-work-pool.placement" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range uniq . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext: {{- toYaml $pod.securityContext | nindent 2 }}
{{- range $key := list "priorityClassName" "runtimeClassName" "dnsPolicy" }}
{{- with index $pod $key }}
{{ $key }}: {{ . | quote }}
{{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "hostAliases" "dnsConfig" }}
{{- with index $pod $key }}
{{ $key }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
