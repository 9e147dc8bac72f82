{{/* TLS inside the cluster: the certificate's Secret, its names, and the parts that each pod mounts. */}}

{{/* Name of the Secret with certificate, key and CA. Empty: no TLS. */}}
{{- define "prefect-server.tlsSecret" -}}
{{- if .Values.tls.enabled -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "prefect-server.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{/* Secret with the certificate of the bundled database. Empty: another database, or no TLS. */}}
{{- define "prefect-server.databaseTls" -}}
{{- if eq (include "prefect-server.databaseMode" .) "bundled" -}}{{- include "prefect-server.tlsSecret" . -}}{{- end -}}
{{- end -}}

{{- define "prefect-server.scheme" -}}
http{{ if .Values.tls.enabled }}s{{ end }}
{{- end -}}

{{/* DNS names of the certificate, as a YAML list. `localhost` is for the commands that forward a port of the API. */}}
{{- define "prefect-server.tlsNames" -}}
{{- $names := list "localhost" -}}
{{- range $component := list "api" "database" "pgbouncer" "redis" -}}
{{- $name := printf "%s-%s" (include "prefect-server.fullname" $) $component -}}
{{- $long := printf "%s.%s" $name $.Release.Namespace -}}
{{- $names = concat $names (list $name $long (printf "%s.svc" $long) (printf "%s.svc.cluster.local" $long)) -}}
{{- end -}}
{{- toYaml $names -}}
{{- end -}}

{{/* Volumes of a pod with TLS, as a YAML list: (list root keys...). Clients mount the CA alone. Postgres refuses a key that
     everyone may read. */}}
{{- define "prefect-server.tlsVolumes" -}}
{{- $volumes := list -}}
{{- with include "prefect-server.tlsSecret" (index . 0) -}}
{{- $items := list -}}
{{- range slice $ 1 -}}{{- $items = append $items (dict "key" . "path" .) -}}{{- end -}}
{{- $volumes = list (dict "name" "tls" "secret" (dict "secretName" . "defaultMode" 288 "items" $items)) -}}
{{- end -}}
{{- toYaml $volumes -}}
{{- end -}}

{{- define "prefect-server.tlsMounts" -}}
{{- $mounts := list -}}
{{- if .Values.tls.enabled -}}{{- $mounts = list (dict "name" "tls" "mountPath" "/etc/prefect-tls" "readOnly" true) -}}{{- end -}}
{{- toYaml $mounts -}}
{{- end -}}

{{/* Variables of libpq for the bundled database. asyncpg reads them, too. */}}
{{- define "prefect-server.databaseTlsEnv" -}}
{{- if include "prefect-server.databaseTls" . }}
- {name: PGSSLMODE, value: verify-full}
- {name: PGSSLROOTCERT, value: /etc/prefect-tls/ca.crt}
{{- end }}
{{- end -}}
