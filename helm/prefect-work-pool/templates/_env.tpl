{{/* The environment of a component's container: (list root component). A name is there once, the last one wins:
     the chart's own, `settings` and `env` of worker, sync, drift and reconciler (runs have the worker's settings from the worker),
     those of the component. */}}
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

{{/* What the chart itself sets: (list root component). */}}
{{- define "prefect-work-pool.ownEnv" -}}
{{- $root := index . 0 -}}
- {name: PREFECT_HOME, value: /tmp/prefect}
- {name: PREFECT_API_URL, value: {{ include "prefect-work-pool.line" (list $root "api.url" $root.Values.api.url) | quote }}}
{{- with $root.Values.api.auth }}
{{- if .existingSecret }}
- name: PREFECT_API_AUTH_STRING
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}}
{{- end }}
{{- end }}
{{- if has (index . 1) (list "worker" "reconciler") }}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
{{- end }}
{{- if eq (index . 1) "worker" }}
{{- include "prefect-work-pool.workerEnv" $root }}
{{- end }}
{{- end -}}

{{- define "prefect-work-pool.runsEnv" -}}
# Prefect's own 5 give up after a minute of an API that is away, and the run with it; these, at most 15 s apart, after four.
- {name: PREFECT_CLIENT_MAX_RETRIES, value: "19"}
# How long an execution may take to end before it is killed.
- {name: GRACE_SECONDS, value: {{ int64 .Values.runs.terminationGracePeriodSeconds | quote }}}
# A server whose database is away answers 500.
- {name: PREFECT_CLIENT_RETRY_EXTRA_CODES, value: "500,504"}
{{- range concat .Values.env .Values.worker.env }}
{{- if and (eq .name "PREFECT_CLIENT_CUSTOM_HEADERS") (hasKey . "valueFrom") }}
# The worker copies its settings to runs, but none that is secret.
- {{ toJson . }}
{{- end }}
{{- end }}
# By it an execution knows that it was given up.
- {name: KUBERNETES_JOB, valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}}
{{- with .Values.runs.results }}
{{- if eq .storage "volume" }}
- {name: PREFECT_RESULTS_LOCAL_STORAGE_PATH, value: /results}
{{- else if ne .storage "none" }}
- {name: PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK, value: remote-file-system/{{ include "prefect-work-pool.resultsBlock" $ }}}
{{- if not .persistByDefault }}
# Where the storage is a block, Prefect takes the other setting for true.
- {name: PREFECT_TASKS_DEFAULT_PERSIST_RESULT, value: "false"}
{{- end }}
{{- end }}
{{- if ne .storage "none" }}
- {name: PREFECT_RESULTS_PERSIST_BY_DEFAULT, value: {{ .persistByDefault | quote }}}
{{- end }}
{{- if eq .storage "redis" }}
- name: RESULTS_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .redis.existingSecret | quote }}, key: {{ .redis.key | quote }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "prefect-work-pool.workerEnv" -}}
{{- with .Values.api.auth }}
{{- if .existingSecret }}
# So that a run's Job refers to the Secret instead of having the password in its manifest.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME, value: {{ .existingSecret | quote }}}
- {name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY, value: {{ .key | quote }}}
{{- end }}
{{- end }}
{{- if .Values.reconciler.enabled }}
# The reconciler sees more of a pod's end, and two of them would each say it in its own words.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED, value: "false"}
{{- end }}
# Without it pods and Jobs are watched in the whole cluster, which the Role does not allow.
- {name: PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES, value: $(NAMESPACE)}
{{- with .Values.worker }}
- {name: PREFECT_WORKER_QUERY_SECONDS, value: {{ int64 .querySeconds | quote }}}
- {name: PREFECT_WORKER_PREFETCH_SECONDS, value: {{ int64 .prefetchSeconds | quote }}}
- {name: PREFECT_WORKER_HEARTBEAT_SECONDS, value: {{ int64 .heartbeatSeconds | quote }}}
# A run that is cancelled loses its pod.
- {name: PREFECT_WORKER_ENABLE_CANCELLATION, value: "true"}
- {name: PREFECT_API_ENABLE_HTTP2, value: {{ .http2 | quote }}}
{{- end }}
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
