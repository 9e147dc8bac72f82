{{/* Environment of a component's container: (list root component). Each name is set once. Precedence, lowest first: the chart's
     variables, the top-level `settings` and `env`, the component's `settings` and `env`. */}}
{{- define "prefect-server.env" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $entries := include "prefect-server.ownEnv" . | fromYamlArray -}}
{{- range $level := list (dict "path" "env" "values" $root.Values) (dict "path" (printf "%s.env" $component) "values" (index $root.Values $component)) -}}
{{- range $name, $value := $level.values.settings -}}
{{- $entries = append $entries (dict "name" $name "value" (include "prefect-server.text" $value)) -}}
{{- end -}}
{{- $entries = concat $entries (include "prefect-server.givenEnv" (list $root $level.path $level.values.env) | fromYamlArray) -}}
{{- end -}}
{{- include "prefect-server.byKey" (list "name" $entries list) -}}
{{- end -}}

{{/* `env` of the values with its templates rendered, as a YAML list: (list root path env). Numbers become text. */}}
{{- define "prefect-server.givenEnv" -}}
{{- $entries := include "prefect-server.filled" . | fromYamlArray -}}
{{- range $entries -}}
{{- if hasKey . "value" -}}{{- $_ := set . "value" (include "prefect-server.text" .value) -}}{{- end -}}
{{- end -}}
{{- toYaml $entries -}}
{{- end -}}

{{/* Variables with the address of the database, as Prefect's settings. */}}
{{- define "prefect-server.databaseEnv" -}}
{{- $database := .Values.database -}}
{{- if eq (include "prefect-server.databaseMode" .) "external" }}
- name: PREFECT_SERVER_DATABASE_CONNECTION_URL
  valueFrom: {secretKeyRef: {name: {{ $database.external.existingSecret | quote }}, key: {{ $database.external.key | quote }}}}
{{- else }}
- {name: PREFECT_SERVER_DATABASE_DRIVER, value: postgresql+asyncpg}
- {name: PREFECT_SERVER_DATABASE_HOST, value: {{ include "prefect-server.databaseHost" . }}}
- {name: PREFECT_SERVER_DATABASE_PORT, value: "5432"}
- {name: PREFECT_SERVER_DATABASE_NAME, value: prefect}
- name: PREFECT_SERVER_DATABASE_USER
  {{- include "prefect-server.databaseUser" . | nindent 2 }}
- name: PREFECT_SERVER_DATABASE_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.databaseSecret" . | quote }}, key: password}}
{{- end }}
{{- end -}}

{{/* Variables that the chart sets: (list root component). The container that waits for the schema is of the migrations. The third
     item is then the component of its pod, which may reach only PgBouncer. */}}
{{- define "prefect-server.ownEnv" -}}
{{- $root := index . 0 -}}
{{- $database := $root.Values.database -}}
- {name: PREFECT_HOME, value: /tmp/prefect}
- {name: PREFECT_SERVER_DATABASE_MIGRATE_ON_START, value: "false"}
- {name: PREFECT_SERVER_DATABASE_SQLALCHEMY_POOL_SIZE, value: {{ int64 $database.poolSize | quote }}}
- {name: PREFECT_SERVER_DATABASE_SQLALCHEMY_MAX_OVERFLOW, value: {{ int64 $database.maxOverflow | quote }}}
# 5 s by default. On a busy node a connection takes longer, and the API would answer 500.
- {name: PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT, value: "30"}
{{- include "prefect-server.databaseEnv" $root }}
{{- include "prefect-server.databaseTlsEnv" $root }}
{{- if and $root.Values.pgbouncer.enabled (has (last .) (list "api" "services")) }}
- {name: PGBOUNCER_ADDRESS, value: "{{ include "prefect-server.fullname" $root }}-pgbouncer:{{ include "prefect-server.pgbouncerPort" $root }}"}
{{- if $root.Values.tls.enabled }}
- {name: PGBOUNCER_CA_FILE, value: /etc/prefect-tls/ca.crt}
{{- end }}
# 10 s by default for a statement. With PgBouncer the time counts that a client waits for a connection: up to 30 s.
- {name: PREFECT_SERVER_DATABASE_TIMEOUT, value: "40"}
{{- end }}
{{- if not (has (index . 1) (list "migrations" "backup")) }}
{{- include "prefect-server.serverEnv" . }}
{{- end }}
{{- end -}}

{{/* Variables of API and services, which migrations and backups do not need: (list root component). */}}
{{- define "prefect-server.serverEnv" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.auth.enabled }}
- name: PREFECT_SERVER_API_AUTH_STRING
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.authSecret" $root | quote }}, key: {{ $root.Values.auth.key | quote }}}}
# Services call the API with Prefect's client.
- name: PREFECT_API_AUTH_STRING
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.authSecret" $root | quote }}, key: {{ $root.Values.auth.key | quote }}}}
{{- end }}
{{- with include "prefect-server.encryptionKeySecret" $root }}
- name: PREFECT_SERVER_ENCRYPTION_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $root.Values.encryptionKey.key | quote }}}}
{{- end }}
{{- include "prefect-server.redisEnv" $root }}
{{- if eq (index . 1) (ternary "services" "api" $root.Values.services.separate) }}
- {name: SERVICES_HEALTH_PORT, value: "4201"}
- {name: SERVICES_STALL_SECONDS, value: {{ int64 $root.Values.services.stallSeconds | quote }}}
# By default the services drop events after five failed writes, and triggers after four: after 25 s without the database.
- {name: PREFECT_SERVER_SERVICES_EVENT_PERSISTER_MAX_FLUSH_RETRIES, value: "10000"}
{{- if include "prefect-server.redis" $root }}
- {name: PREFECT_REDIS_MESSAGING_CONSUMER_MAX_RETRIES, value: "60"}
{{- end }}
{{- include "prefect-server.retentionEnv" $root }}
{{- end }}
- {name: PREFECT_SERVER_API_BASE_PATH, value: {{ $root.Values.api.basePath }}}
- {name: PREFECT_API_URL, value: "{{ include "prefect-server.scheme" $root }}://{{ include "prefect-server.fullname" $root }}-api:{{ int64 $root.Values.service.port }}{{ $root.Values.api.basePath }}"}
{{- if $root.Values.tls.enabled }}
- {name: PREFECT_API_SSL_CERT_FILE, value: /etc/prefect-tls/ca.crt}
{{- end }}
{{- if eq (index . 1) "api" }}
{{- if $root.Values.tls.enabled }}
- {name: API_TLS_CERTIFICATE, value: /etc/prefect-tls/tls.crt}
- {name: API_TLS_KEY, value: /etc/prefect-tls/tls.key}
{{- end }}
{{- if include "prefect-server.roles" $root }}
- {name: API_CREDENTIALS, value: /etc/prefect-api/credentials}
{{- if $root.Values.oidc.enabled }}
- {name: OIDC_GROUPS, value: {{ toJson $root.Values.oidc.groups | quote }}}
{{- end }}
{{- end }}
- {name: PREFECT_SERVER_API_HOST, value: 0.0.0.0}
- {name: PREFECT_SERVER_API_PORT, value: "4200"}
- {name: PREFECT_UI_API_URL, value: {{ $root.Values.api.uiApiUrl | default $root.Values.api.basePath | quote }}}
- {name: PREFECT_UI_STATIC_DIRECTORY, value: /tmp/ui}
{{- else if eq (index . 1) "services" }}
# Since Prefect 3.9 these processes, too, would write the UI's files, which they never serve.
- {name: PREFECT_UI_ENABLED, value: "false"}
{{- end }}
{{- end -}}

{{/* Variables of the state that the processes of the server share. */}}
{{- define "prefect-server.redisEnv" -}}
{{- if include "prefect-server.redis" . }}
{{- if .Values.redis.external.existingSecret }}
- name: REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ .Values.redis.external.existingSecret | quote }}, key: {{ .Values.redis.external.key | quote }}}
{{- else }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.redisSecret" . | quote }}, key: password}}
- name: REDIS_URL
  value: redis{{ if .Values.tls.enabled }}s{{ end }}://:$(REDIS_PASSWORD)@{{ include "prefect-server.fullname" . }}-redis:6379/0{{ if .Values.tls.enabled }}?ssl_ca_certs=/etc/prefect-tls/ca.crt{{ end }}
{{- end }}
# Set all of them or none: other processes do not see what stays in one process' memory, and runs are scheduled twice.
- {name: PREFECT_REDIS_MESSAGING_URL, value: $(REDIS_URL)}
- {name: PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL, value: $(REDIS_URL)}
- {name: PREFECT_SERVER_DOCKET_URL, value: $(REDIS_URL)}
- {name: PREFECT_SERVER_EVENTS_MESSAGING_BROKER, value: prefect_redis.messaging}
- {name: PREFECT_SERVER_EVENTS_MESSAGING_CACHE, value: prefect_redis.messaging}
- {name: PREFECT_SERVER_EVENTS_CAUSAL_ORDERING, value: prefect_redis.ordering}
- {name: PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE, value: prefect_redis.lease_storage}
- {name: PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE, value: prefect_redis.cleanup_queue}
# By default the API keeps up to five events of a websocket in memory, for up to 10 s. A killed API would lose them.
- {name: PREFECT_REDIS_MESSAGING_PUBLISHER_BATCH_SIZE, value: "1"}
# How long a service's request for messages waits for one. At 1 s by default the services ask ten times a second. The time must
# be shorter than services.stallSeconds and than a socket_timeout in the URL of an external Redis.
- {name: PREFECT_REDIS_MESSAGING_CONSUMER_BLOCK, value: "3"}
{{- end }}
{{- end -}}

{{/* Ages of the server's records. Prefect's vacuum deletes events, orchestration/services/retention.py the others. */}}
{{- define "prefect-server.retentionEnv" -}}
{{- $days := .Values.retention.days }}
- {name: PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED, value: "{{ if int64 $days.events }}events,{{ end }}orphans"}
{{- with int64 $days.events }}
- {name: PREFECT_SERVER_EVENTS_RETENTION_PERIOD, value: P{{ . }}D}
{{- end }}
{{- range $kind := list "runs" "logs" "artifacts" }}
{{- with int64 (index $days $kind) }}
- {name: RETENTION_{{ upper $kind }}_DAYS, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Command of a container that uses the bundled Redis: (list root component). A password may have characters that a URL
     cannot have, and Kubernetes copies them into REDIS_URL unchanged. The command encodes each byte as %XX. */}}
{{- define "prefect-server.redisCommand" -}}
{{- $root := index . 0 -}}
{{- if and (ne (index . 1) "migrations") $root.Values.redis.bundled.enabled -}}
- tini
- -g
- --
- sh
- -c
- |
  password=$(printf %s "$REDIS_PASSWORD" | od -An -v -tx1 | tr -d '\n' | tr ' ' %)
  for name in PREFECT_REDIS_MESSAGING_URL PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL PREFECT_SERVER_DOCKET_URL; do
    if [ "$(printenv "$name")" = "$REDIS_URL" ]; then export "$name=${REDIS_URL%%:*}://:$password@${REDIS_URL##*@}"; fi
  done
  exec "$@"
- --
{{- end -}}
{{- end -}}
