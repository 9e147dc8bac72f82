{{/* Environment of a component's container: (list root component). Each name is set once. Precedence, lowest first: the chart's
     variables, the top-level `settings` and `env`, the component's `settings` and `env`. Runs skip the top-level ones: the
     worker hands its settings on to them. */}}
{{- define "prefect-work-pool.env" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $levels := list (dict "path" (printf "%s.env" $component) "values" (index $root.Values $component)) -}}
{{- $entries := list -}}
{{- if ne (index . 1) "runs" -}}
{{- $levels = prepend $levels (dict "path" "env" "values" $root.Values) -}}
{{- $entries = include "prefect-work-pool.ownEnv" . | fromYamlArray -}}
{{- else -}}
{{- $entries = include "prefect-work-pool.runsEnv" $root | fromYamlArray -}}
{{- end -}}
{{- range $level := $levels -}}
{{- range $name, $value := $level.values.settings -}}
{{- $entries = append $entries (dict "name" $name "value" (include "prefect-work-pool.text" $value)) -}}
{{- end -}}
{{- range include "prefect-work-pool.filled" (list $root $level.path $level.values.env) | fromYamlArray -}}
{{- if hasKey . "value" -}}{{- $_ := set . "value" (include "prefect-work-pool.text" .value) -}}{{- end -}}
{{- $entries = append $entries . -}}
{{- end -}}
{{- end -}}
{{- $last := dict -}}
{{- $names := list -}}
{{- range $entries -}}
{{- if not (hasKey $last .name) -}}{{- $names = append $names .name -}}{{- end -}}
{{- $_ := set $last .name . -}}
{{- end -}}
{{- range $names }}
- {{ toYaml (get $last .) | nindent 2 | trim }}
{{- end -}}
{{- end -}}

{{/* Variables that the chart sets: (list root component). */}}
{{- define "prefect-work-pool.ownEnv" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
- {name: PREFECT_HOME, value: /tmp/prefect}
- {name: PREFECT_API_URL, value: {{ include "prefect-work-pool.apiUrl" $root | quote }}}
{{- include "prefect-work-pool.caEnv" $root }}
{{- with $root.Values.api.auth }}
{{- if include "prefect-work-pool.rolesSecret" $root }}
- name: PREFECT_API_AUTH_STRING
  valueFrom: {secretKeyRef: {name: {{ .rolesSecret | quote }}, key: {{ ternary $component "sync" (has $component (list "worker" "reconciler")) }}}}
{{- else if .existingSecret }}
- name: PREFECT_API_AUTH_STRING
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}}
{{- end }}
{{- end }}
{{- if has (index . 1) (list "worker" "reconciler") }}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
{{- end }}
{{- if eq $component "sync" }}
# The files of the sync may read these variables, and no others: the Job has the credential of the API.
{{- $names := list "SYNC_*" -}}
{{- range $root.Values.sync.env }}{{- $names = append $names .name }}{{- end }}
{{- $names = concat $names (keys $root.Values.sync.settings | sortAlpha) }}
- {name: SYNC_ENVIRONMENT, value: {{ without $names "PREFECT_API_AUTH_STRING" "PREFECT_API_KEY" | uniq | join "," | quote }}}
{{- end }}
{{- if eq (index . 1) "worker" }}
{{- include "prefect-work-pool.workerEnv" $root }}
{{- end }}
{{- end -}}

{{- define "prefect-work-pool.runsEnv" -}}
# Prefect's default of 5 retries fails the run after one minute without the API. 19 retries, at most 15 s apart, last four.
- {name: PREFECT_CLIENT_MAX_RETRIES, value: "19"}
# Grace period of a run attempt: the supervisor kills the process group after it.
- {name: GRACE_SECONDS, value: {{ int64 .Values.runs.terminationGracePeriodSeconds | quote }}}
{{- with .Values.runs.logLimit }}
- {name: LOG_LIMIT, value: {{ . | quote }}}
{{- end }}
{{- include "prefect-work-pool.caEnv" . }}
# A server without its database answers 500.
- {name: PREFECT_CLIENT_RETRY_EXTRA_CODES, value: "500,504"}
{{- range concat .Values.env .Values.worker.env }}
{{- if and (eq .name "PREFECT_CLIENT_CUSTOM_HEADERS") (hasKey . "valueFrom") }}
# The worker copies its settings to runs, except secret ones.
- {{ toJson . }}
{{- end }}
{{- end }}
# The supervisor finds by its Job's name whether its run attempt is fenced.
- {name: KUBERNETES_JOB, valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}}
{{- with .Values.runs.results }}
{{- if eq .storage "volume" }}
- {name: PREFECT_RESULTS_LOCAL_STORAGE_PATH, value: /results}
{{- else if ne .storage "none" }}
- {name: PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK, value: remote-file-system/{{ include "prefect-work-pool.resultsBlock" $ }}}
{{- if not .persistByDefault }}
# With a storage block, Prefect takes PREFECT_RESULTS_PERSIST_BY_DEFAULT for true.
- {name: PREFECT_TASKS_DEFAULT_PERSIST_RESULT, value: "false"}
{{- end }}
{{- end }}
{{- if ne .storage "none" }}
- {name: PREFECT_RESULTS_PERSIST_BY_DEFAULT, value: {{ .persistByDefault | quote }}}
- {name: RESULTS_LIMIT, value: {{ .limit | quote }}}
{{- end }}
{{- if eq .storage "redis" }}
- name: RESULTS_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .redis.existingSecret | quote }}, key: {{ .redis.key | quote }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "prefect-work-pool.workerEnv" -}}
{{- with .Values.api.auth }}
{{- if include "prefect-work-pool.rolesSecret" $ }}
# The worker derives the credential of each run.
- {name: RUN_CREDENTIALS, value: /etc/prefect-api/run-key}
{{- else if .existingSecret }}
# A run's Job then refers to the Secret, and its manifest has no password.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME, value: {{ .existingSecret | quote }}}
- {name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY, value: {{ .key | quote }}}
{{- end }}
{{- end }}
{{- if .Values.reconciler.enabled }}
# The reconciler reports how pods end, in more detail. Prefect's observer would report each end a second time.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED, value: "false"}
{{- end }}
# The default is to watch pods and Jobs in the whole cluster, which the Role does not allow.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES, value: {{ include "prefect-work-pool.runsNamespaceArgument" . }}}
{{- with .Values.worker }}
- {name: PREFECT_WORKER_QUERY_SECONDS, value: {{ int64 .querySeconds | quote }}}
- {name: PREFECT_WORKER_PREFETCH_SECONDS, value: {{ int64 .prefetchSeconds | quote }}}
- {name: PREFECT_WORKER_HEARTBEAT_SECONDS, value: {{ int64 .heartbeatSeconds | quote }}}
# Cancelling a run deletes its pod.
- {name: PREFECT_WORKER_ENABLE_CANCELLATION, value: "true"}
- {name: PREFECT_API_ENABLE_HTTP2, value: {{ .http2 | quote }}}
{{- end }}
{{- end -}}

{{/* Not empty if the worker observes its Jobs and pods. It does unless a setting turns it off. */}}
{{- define "prefect-work-pool.observes" -}}
{{- $observes := "true" -}}
{{- range include "prefect-work-pool.env" (list . "worker") | fromYamlArray -}}
{{- if and (eq .name "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED") (has (lower (.value | default "")) (list "false" "0")) -}}
{{- $observes = "" -}}
{{- end -}}
{{- end -}}
{{- $observes -}}
{{- end -}}

{{/* `env` and `envFrom` of a component's container: (list root component). */}}
{{- define "prefect-work-pool.containerEnv" -}}
{{- $root := index . 0 -}}
{{- $all := ternary list $root.Values.envFrom (eq (index . 1) "runs") -}}
env:
  {{- include "prefect-work-pool.env" . | nindent 2 }}
{{- with concat $all (index $root.Values (index . 1)).envFrom }}
envFrom:
  {{- include "prefect-work-pool.filled" (list $root "envFrom" .) | nindent 2 }}
{{- end }}
{{- end -}}
