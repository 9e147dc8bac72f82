{{/* Pod template of API, services and migrations: (dict "root" "component" "args" "container" "wait" "roles"). `container` has
     more keys of the main container. `wait` adds the init container that waits for the database schema. `roles` mounts the
     credentials of the roles. */}}
{{- define "prefect-server.pod" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .component -}}
{{- $pod := include "prefect-server.podValues" (list $root .component) | fromYaml -}}
{{- $mounts := include "prefect-server.databaseTlsMounts" $root | fromYamlArray -}}
{{- $keys := ternary (list "ca.crt" "tls.crt" "tls.key") (list "ca.crt") (eq .component "api") -}}
{{- $volumes := include "prefect-server.databaseTlsVolumes" (prepend $keys $root) | fromYamlArray -}}
{{- if .roles -}}
{{- $mounts = append $mounts (dict "name" "credentials" "mountPath" "/etc/prefect-api/credentials" "readOnly" true) -}}
{{- $volumes = append $volumes (dict "name" "credentials" "secret" (dict "secretName" (include "prefect-server.rolesSecret" $root))) -}}
{{- end -}}
{{ include "prefect-server.podMetadata" (list $root .component $pod) }}
spec:
  serviceAccountName: {{ include "prefect-server.serviceAccountName" $root | quote }}
  automountServiceAccountToken: {{ $root.Values.serviceAccount.automountToken }}
  enableServiceLinks: false
  {{- include "prefect-server.pullSecrets" $root | nindent 2 }}
  {{- if hasKey $values "terminationGracePeriodSeconds" }}
  terminationGracePeriodSeconds: {{ int64 $values.terminationGracePeriodSeconds }}
  {{- end }}
  {{- include "prefect-server.placement" (list $root $pod) | nindent 2 }}
  {{- if or .wait $pod.initContainers }}
  initContainers:
    {{- if .wait }}
    {{- include "prefect-server.waitForMigrations" (list $root $pod .component) | nindent 4 }}
    {{- end }}
    {{- with $pod.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "prefect-server.image" $root.Values.image | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- with include "prefect-server.redisCommand" (list $root .component) }}
      command: {{- . | nindent 8 }}
      {{- end }}
      args: {{- toYaml .args | nindent 8 }}
      {{- include "prefect-server.containerEnv" (list $root .component) | nindent 6 }}
      resources: {{- include "prefect-server.resources" $values.resources | nindent 8 }}
      securityContext: {{- toYaml $pod.containerSecurityContext | nindent 8 }}
      {{- with $values.lifecycle }}
      lifecycle: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .container }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      volumeMounts:
        {{- include "prefect-server.mounts" (list $mounts $pod) | nindent 8 }}
    {{- /* A sidecar would keep the Job of the migrations from ending. */}}
    {{- with ternary list $pod.sidecars (eq .component "migrations") }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "prefect-server.volumes" (list $volumes $pod) | nindent 4 }}
{{- end -}}

{{/* Volumes of a pod, and mounts of its main container: (list (the chart's own, without /tmp) pod). The chart adds /tmp. A
     volume or mount of the user with the same name or path replaces it. */}}
{{- define "prefect-server.volumes" -}}
{{- $own := prepend (index . 0) (dict "name" "tmp" "emptyDir" (dict "sizeLimit" (index . 1).tmpSizeLimit)) -}}
{{- include "prefect-server.byKey" (list "name" $own (index . 1).volumes) -}}
{{- end -}}

{{- define "prefect-server.mounts" -}}
{{- $own := prepend (index . 0) (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- include "prefect-server.byKey" (list "mountPath" $own (index . 1).volumeMounts) -}}
{{- end -}}

{{/* Pod values of a component, with templates rendered: (list root component). The component's `pod` wins over the top-level
     `pod`. */}}
{{- define "prefect-server.podValues" -}}
{{- $root := index . 0 -}}
{{- $all := include "prefect-server.filled" (list $root "pod" $root.Values.pod) | fromYaml -}}
{{- $own := include "prefect-server.filled" (list $root (printf "%s.pod" (index . 1)) (index $root.Values (index . 1)).pod) | fromYaml -}}
{{- $pod := mergeOverwrite $all $own -}}
{{- include "prefect-server.completeContainers" $pod -}}
{{- toYaml $pod -}}
{{- end -}}

{{/* Complete the containers in a pod's values, in place. A user's container without a securityContext gets that of the chart's
     containers. Numbers become text where Kubernetes needs text. */}}
{{- define "prefect-server.completeContainers" -}}
{{- $security := .containerSecurityContext -}}
{{- range $container := concat (.initContainers | default list) (.sidecars | default list) -}}
{{- if and $security (not .securityContext) -}}{{- $_ := set . "securityContext" $security -}}{{- end -}}
{{- range .env -}}
{{- if hasKey . "value" -}}{{- $_ := set . "value" (include "prefect-server.text" .value) -}}{{- end -}}
{{- end -}}
{{- with .resources -}}{{- $_ := set $container "resources" (include "prefect-server.resources" . | fromYaml) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Pod values of the bundled database or Redis, whose image has another user: (list root component). Of the top-level `pod`
     they take placement, DNS and the containers' security context. */}}
{{- define "prefect-server.bundledPod" -}}
{{- $root := index . 0 -}}
{{- $bundled := (index $root.Values (index . 1)).bundled -}}
{{- $uid := int64 $bundled.uid -}}
{{- $security := dict "runAsNonRoot" true "runAsUser" $uid "runAsGroup" $uid "fsGroup" $uid "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- $all := include "prefect-server.filled" (list $root "pod" (omit $root.Values.pod "sidecars" "initContainers" "volumes" "volumeMounts" "labels" "annotations")) | fromYaml -}}
{{- $own := include "prefect-server.filled" (list $root (printf "%s.bundled.pod" (index . 1)) $bundled.pod) | fromYaml -}}
{{- $pod := mergeOverwrite $all (dict "securityContext" $security) $own -}}
{{- include "prefect-server.completeContainers" $pod -}}
{{- toYaml $pod -}}
{{- end -}}

{{- define "prefect-server.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range uniq . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* `metadata` of a pod template: (list root component pod). */}}
{{- define "prefect-server.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 2 -}}
metadata:
  labels:
    {{- include "prefect-server.mergedLabels" (list $root (include "prefect-server.podLabels" . | fromYaml) (printf "%s.pod.labels" (index . 1)) $pod.labels) | nindent 4 }}
  annotations:
    checksum/secrets: {{ include "prefect-server.secrets" $root | sha256sum }}
    {{- with mergeOverwrite (include "prefect-server.filled" (list $root "commonAnnotations" $root.Values.commonAnnotations) | fromYaml) ($pod.annotations | default dict) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Init container that waits for the database schema of this release's Prefect: (list root pod component). */}}
{{- define "prefect-server.waitForMigrations" -}}
{{- $root := index . 0 -}}
- name: wait-for-migrations
  image: {{ include "prefect-server.image" $root.Values.image | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [python, -m, orchestration.migrations, wait]
  {{- include "prefect-server.containerEnv" (list $root "migrations" (index . 2)) | nindent 2 }}
  resources: {{- include "prefect-server.resources" $root.Values.migrations.resources | nindent 4 }}
  securityContext: {{- toYaml (index . 1).containerSecurityContext | nindent 4 }}
  volumeMounts:
    {{- include "prefect-server.mounts" (list (include "prefect-server.databaseTlsMounts" $root | fromYamlArray) (index . 1)) | nindent 4 }}
{{- end -}}

{{/* `env` and `envFrom` of a component's container: (list root component), as `prefect-server.env`. */}}
{{- define "prefect-server.containerEnv" -}}
{{- $root := index . 0 -}}
env:
  {{- include "prefect-server.env" . | nindent 2 }}
{{- with concat $root.Values.envFrom (index $root.Values (index . 1)).envFrom }}
envFrom:
  {{- include "prefect-server.filled" (list $root "envFrom" .) | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Placement and security context of a pod: (list root pod). */}}
{{- define "prefect-server.placement" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
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
