{{/* Rules and addresses of the component pgbouncer, and how many connections to Postgres a release may open. */}}

{{- define "prefect-server.validatePgbouncer" -}}
{{- with .Values.pgbouncer -}}
{{- if .enabled -}}
{{- range $component := list "api" "services" -}}
{{- if (index $.Values $component).args -}}
{{- fail (printf "pgbouncer.enabled=true and %s.args are both set: %s.args replaces the command that connects through PgBouncer. Leave %s.args empty (api.extraArgs adds arguments), or set pgbouncer.enabled=false." $component $component $component) -}}
{{- end -}}
{{- end -}}
{{- $own := or (eq (include "prefect-server.databaseMode" $) "bundled") (include "prefect-server.databaseCa" $) -}}
{{- if and $own (or .serverTLS.mode .serverTLS.caSecret) -}}
{{- fail "pgbouncer.serverTLS.mode or caSecret is set with a bundled database, or with CloudNativePG and tls.enabled=true: they are for an external database. Leave them empty: tls.enabled=true covers both." -}}
{{- end -}}
{{- if and (hasPrefix "verify-" .serverTLS.mode) (not .serverTLS.caSecret) -}}
{{- fail (printf "pgbouncer.serverTLS.mode=%s needs pgbouncer.serverTLS.caSecret: PgBouncer has no certificate to check the database against. Name a Secret with the CA's certificate, or set mode=require." .serverTLS.mode) -}}
{{- end -}}
{{- if not (or .image.tag .image.digest) -}}
{{- fail "pgbouncer.image.tag is empty: the image has no version. Set pgbouncer.image.tag or pgbouncer.image.digest." -}}
{{- end -}}
{{- $paths := dict "settings" $.Values.settings "api.settings" $.Values.api.settings "services.settings" $.Values.services.settings -}}
{{- $mode := .serverTLS.mode -}}
{{- range $path, $settings := $paths -}}
{{- if and (hasKey $settings "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_TLS_ENABLED") (not $mode) -}}
{{- if $own -}}
{{- fail (printf "%s has TLS for the database: PgBouncer does not read Prefect's settings of TLS. Remove the setting: tls.enabled=true covers a bundled database and CloudNativePG." $path) -}}
{{- end -}}
{{- fail (printf "%s has TLS for the database and pgbouncer.serverTLS.mode is empty: PgBouncer does not read Prefect's settings of TLS. Set pgbouncer.serverTLS.mode, with caSecret for verify-ca and verify-full." $path) -}}
{{- end -}}
{{- if hasKey $settings "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH" -}}
{{- fail (printf "%s has a search path and pgbouncer.enabled is true: PgBouncer refuses a connection that sets one. Set it for the role in Postgres (alter role ... set search_path), or set pgbouncer.enabled=false." $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Port of PgBouncer. */}}
{{- define "prefect-server.pgbouncerPort" -}}6432{{- end -}}

{{/* Arguments of the container that writes the files with the database's address and password. */}}
{{- define "prefect-server.pgbouncerArgs" -}}
{{- $tls := .Values.pgbouncer.serverTLS -}}
- python
- -m
- orchestration.pgbouncer
- /run/pgbouncer
{{- with $tls.mode }}
- --tls-mode={{ . }}
{{- end }}
{{- with include "prefect-server.databaseCa" . }}
- --tls-mode=verify-full
- --ca-file={{ . }}
{{- end }}
{{- if $tls.caSecret }}
- --ca-file=/etc/pgbouncer-ca/{{ $tls.caKey }}
{{- end }}
{{- end -}}

{{/* Pods that a component has at most, those of a rollout included: (list root component). */}}
{{- define "prefect-server.mostPods" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- $scaling := $values.autoscaling | default (dict "enabled" false) -}}
{{- $replicas := int64 (ternary $scaling.maxReplicas $values.replicas $scaling.enabled) -}}
{{- $surge := get ($values.strategy.rollingUpdate | default dict) "maxSurge" | toString -}}
{{- if eq $surge "" -}}{{- $surge = "25%" -}}{{- end -}}
{{- if eq $values.strategy.type "Recreate" -}}
{{- $surge = "0" -}}
{{- else if hasSuffix "%" $surge -}}
{{- $surge = divf (mulf $replicas (trimSuffix "%" $surge | float64)) 100 | ceil -}}
{{- end -}}
{{- ternary 0 (add $replicas (int64 $surge)) (eq $replicas 0) -}}
{{- end -}}

{{/* Connections of PgBouncer, and of the database unless it is external. The message names all values that count. */}}
{{- define "prefect-server.validateConnections" -}}
{{- $values := .Values -}}
{{- $pgbouncer := $values.pgbouncer -}}
{{- $api := include "prefect-server.mostPods" (list . "api") | int64 -}}
{{- $services := ternary (include "prefect-server.mostPods" (list . "services") | int64) 0 $values.services.separate -}}
{{- $clients := mul (add $api $services) (add (int64 $values.database.poolSize) (int64 $values.database.maxOverflow)) -}}
{{- $shown := printf "%d API and %d services pods (api.replicas or api.autoscaling.maxReplicas, services.replicas, and a rollout's by strategy.rollingUpdate.maxSurge) x (database.poolSize %d + database.maxOverflow %d)" $api $services (int64 $values.database.poolSize) (int64 $values.database.maxOverflow) -}}
{{- if and $pgbouncer.enabled (gt $clients (int64 $pgbouncer.maxClientConn)) -}}
{{- fail (printf "pgbouncer.maxClientConn is %d: a PgBouncer pod may get %d connections, of %s. Raise maxClientConn, or lower poolSize or maxOverflow." (int64 $pgbouncer.maxClientConn) $clients $shown) -}}
{{- end -}}
{{- $mode := include "prefect-server.databaseMode" . -}}
{{- if ne $mode "external" -}}
{{- $configuration := (index $values.database $mode).configuration -}}
{{- $maximum := get $configuration "max_connections" | default 100 | int64 -}}
{{- $superusers := ternary (get $configuration "superuser_reserved_connections") 3 (hasKey $configuration "superuser_reserved_connections") | int64 -}}
{{- $others := add 4 (ternary 3 0 $values.backup.enabled) $superusers (get $configuration "reserved_connections" | default 0 | int64) -}}
{{- $reserve := printf "%d for migrations, backups, administrators and superusers" $others -}}
{{- if not $pgbouncer.enabled -}}
{{- if gt (add $clients $others) $maximum -}}
{{- fail (printf "database.%s.configuration.max_connections is %d: the release may open %d connections, of %s, and %s. Raise max_connections, lower poolSize or maxOverflow, or set pgbouncer.enabled=true." $mode $maximum (add $clients $others) $shown $reserve) -}}
{{- end -}}
{{- else -}}
{{- $pods := add (int64 $pgbouncer.replicas) 1 -}}
{{- $listeners := ternary $services $api $values.services.separate -}}
{{- $most := add (mul $pods (add (int64 $pgbouncer.defaultPoolSize) (int64 $pgbouncer.reservePoolSize))) $listeners $others -}}
{{- if gt $most $maximum -}}
{{- fail (printf "database.%s.configuration.max_connections is %d: the release may open %d connections, of %d PgBouncer pods (pgbouncer.replicas, and one of a rollout) x (pgbouncer.defaultPoolSize %d + pgbouncer.reservePoolSize %d), %d pods that run services (services.separate, services.replicas) and listen for notifications, and %s (backup.enabled). Raise max_connections, or lower defaultPoolSize or reservePoolSize." $mode $maximum $most $pods (int64 $pgbouncer.defaultPoolSize) (int64 $pgbouncer.reservePoolSize) $listeners $reserve) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
