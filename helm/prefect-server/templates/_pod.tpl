{{/* A pod's template for API, services and migrations:
     (dict "root" "component" "args" "container" (more of the main container) "wait" (for the schema)). */}}
{{- define "prefect-server.pod" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .component -}}
{{- $pod := mergeOverwrite (deepCopy $root.Values.pod) (deepCopy ($values.pod | default dict)) -}}
{{ include "prefect-server.podMetadata" (list $root .component $pod) }}
spec:
  serviceAccountName: {{ include "prefect-server.serviceAccountName" $root }}
  automountServiceAccountToken: {{ $root.Values.serviceAccount.automountToken }}
  enableServiceLinks: false
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $values.terminationGracePeriodSeconds }}
  terminationGracePeriodSeconds: {{ . }}
  {{- end }}
  {{- include "prefect-server.placement" (list $root $pod) | nindent 2 }}
  {{- if or .wait $pod.initContainers }}
  initContainers:
    {{- if .wait }}
    {{- include "prefect-server.waitForMigrations" (list $root $pod) | nindent 4 }}
    {{- end }}
    {{- with $pod.initContainers }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "prefect-server.image" $root.Values.image | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args: {{- toYaml .args | nindent 8 }}
      {{- include "prefect-server.containerEnv" (list $root .component) | nindent 6 }}
      resources: {{- toYaml $values.resources | nindent 8 }}
      securityContext: {{- toYaml $pod.containerSecurityContext | nindent 8 }}
      {{- with $values.lifecycle }}
      lifecycle: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .container }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- with $pod.volumeMounts }}
        {{- tpl (toYaml .) $root | nindent 8 }}
        {{- end }}
    {{- with $pod.sidecars }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    {{- with $pod.volumes }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* (list root component pod) */}}
{{- define "prefect-server.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 2 -}}
metadata:
  labels:
    {{- include "prefect-server.podLabels" . | nindent 4 }}
    {{- with $pod.labels }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
  annotations:
    checksum/secrets: {{ include "prefect-server.secrets" $root | sha256sum }}
    {{- with merge dict $pod.annotations $root.Values.commonAnnotations }}
    {{- tpl (toYaml .) $root | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The container that lets a pod's server start only on the schema that it knows: (list root pod). */}}
{{- define "prefect-server.waitForMigrations" -}}
{{- $root := index . 0 -}}
- name: wait-for-migrations
  image: {{ include "prefect-server.image" $root.Values.image | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [python, -m, orchestration.migrations, wait]
  {{- include "prefect-server.containerEnv" (list $root "migrations") | nindent 2 }}
  resources: {{- toYaml $root.Values.migrations.resources | nindent 4 }}
  securityContext: {{- toYaml (index . 1).containerSecurityContext | nindent 4 }}
  volumeMounts: [{name: tmp, mountPath: /tmp}]
{{- end -}}

{{/* `env` and `envFrom` of a component's container: (list root component). */}}
{{- define "prefect-server.containerEnv" -}}
{{- $root := index . 0 -}}
env:
  {{- include "prefect-server.env" . | nindent 2 }}
{{- with concat $root.Values.envFrom (index $root.Values (index . 1)).envFrom }}
envFrom:
  {{- tpl (toYaml .) $root | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where a pod runs, and as whom: (list root pod). */}}
{{- define "prefect-server.placement" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
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
