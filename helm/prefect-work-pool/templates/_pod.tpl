{{/* A pod's template for worker, sync, drift and reconciler:
     (dict "root" "component" "containers" (the text of them) "serviceAccount" "token" "annotations"). */}}
{{- define "prefect-work-pool.pod" -}}
{{- $root := .root -}}
{{- $pod := include "prefect-work-pool.podValues" (list $root .component) | fromYaml -}}
metadata:
  labels:
    {{- include "prefect-work-pool.podLabels" (list $root .component) | nindent 4 }}
    {{- with $pod.labels }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
  {{- with merge dict (.annotations | default dict) $pod.annotations $root.Values.commonAnnotations }}
  annotations:
    {{- tpl (toYaml .) $root | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ .serviceAccount }}
  automountServiceAccountToken: {{ .token }}
  {{- with (index $root.Values .component).terminationGracePeriodSeconds }}
  terminationGracePeriodSeconds: {{ . }}
  {{- end }}
  {{- include "prefect-work-pool.placement" (list $root $pod) | nindent 2 }}
  {{- .containers | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    {{- with $pod.volumes }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The containers of worker, sync, drift and reconciler:
     (dict "root" "component" "pod" "args" "more" (the text of the main one's other keys)). */}}
{{- define "prefect-work-pool.containers" -}}
{{- with .pod.initContainers }}
initContainers:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
containers:
  - name: {{ .component }}
    {{- include "prefect-work-pool.container" (list .root .component .pod) | nindent 4 }}
    args: {{- toYaml .args | nindent 6 }}
    {{- .more | trim | nindent 4 }}
    volumeMounts:
      {{- include "prefect-work-pool.mounts" (list .root .pod) | nindent 6 }}
  {{- with .pod.sidecars }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A container's probes: (list (the component's values) (the probes' handler)). */}}
{{- define "prefect-work-pool.probes" -}}
{{- range $name := list "startupProbe" "livenessProbe" "readinessProbe" }}
{{ $name }}: {{- merge dict (index (index $ 0) $name) (index $ 1) | toYaml | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What the chart's containers share: (list root component pod). */}}
{{- define "prefect-work-pool.container" -}}
{{- $root := index . 0 -}}
image: {{ include "prefect-work-pool.image" $root.Values.image | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
{{ include "prefect-work-pool.containerEnv" . }}
resources: {{- toYaml (index $root.Values (index . 1)).resources | nindent 2 }}
securityContext: {{- toYaml (index . 2).containerSecurityContext | nindent 2 }}
{{- end -}}

{{/* The mounts of a container: (list root pod). */}}
{{- define "prefect-work-pool.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- with (index . 1).volumeMounts }}
{{ tpl (toYaml .) (index $ 0) }}
{{- end }}
{{- end -}}

{{/* Where a pod runs, and as whom: (list root pod). */}}
{{- define "prefect-work-pool.placement" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext: {{- toYaml $pod.securityContext | nindent 2 }}
{{- range $key := list "priorityClassName" "runtimeClassName" "dnsPolicy" }}
{{- with index $pod $key }}
{{ $key }}: {{ . }}
{{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "hostAliases" "dnsConfig" }}
{{- with index $pod $key }}
{{ $key }}: {{- tpl (toYaml .) $root | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
