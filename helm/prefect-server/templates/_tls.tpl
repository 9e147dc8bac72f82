{{/* TLS inside the cluster: the certificate's Secret, its names, and the parts that each pod mounts. */}}

{{/* Name of the Secret with certificate, key and CA. Empty: no TLS. */}}
{{- define "prefect-server.tlsSecret" -}}
{{- if .Values.tls.enabled -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "prefect-server.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{/* Secret with the CA of CloudNativePG's operator, which signs the Cluster's certificate. Empty: another database, or no TLS. */}}
{{- define "prefect-server.cnpgCa" -}}
{{- if and .Values.tls.enabled (eq (include "prefect-server.databaseMode" .) "cnpg") -}}{{- include "prefect-server.cnpgName" . -}}-ca{{- end -}}
{{- end -}}

{{/* File with the CA of the database's certificate. Empty: an external database, or no TLS. */}}
{{- define "prefect-server.databaseCa" -}}
{{- if include "prefect-server.cnpgCa" . -}}
/etc/prefect-database-ca/ca.crt
{{- else if and .Values.tls.enabled (eq (include "prefect-server.databaseMode" .) "bundled") -}}
/etc/prefect-tls/ca.crt
{{- end -}}
{{- end -}}

{{- define "prefect-server.scheme" -}}
http{{ if .Values.tls.enabled }}s{{ end }}
{{- end -}}

{{/* DNS names of the certificate, as a YAML list. `localhost` is for the commands that forward a port of the API. */}}
{{- define "prefect-server.tlsNames" -}}
{{- $names := list "localhost" -}}
{{- range $component := concat (list "api" "database" "pgbouncer" "redis") (ternary (list "oidc") list .Values.oidc.enabled) -}}
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

{{/* The same volumes and mounts for a client of the database. */}}
{{- define "prefect-server.databaseTlsVolumes" -}}
{{- $volumes := include "prefect-server.tlsVolumes" . | fromYamlArray -}}
{{- with include "prefect-server.cnpgCa" (index . 0) -}}
{{- $volumes = append $volumes (dict "name" "database-ca" "secret" (include "prefect-server.caSource" (list . "ca.crt") | fromYaml)) -}}
{{- end -}}
{{- toYaml $volumes -}}
{{- end -}}

{{- define "prefect-server.databaseTlsMounts" -}}
{{- $mounts := include "prefect-server.tlsMounts" . | fromYamlArray -}}
{{- if include "prefect-server.cnpgCa" . -}}
{{- $mounts = append $mounts (dict "name" "database-ca" "mountPath" "/etc/prefect-database-ca" "readOnly" true) -}}
{{- end -}}
{{- toYaml $mounts -}}
{{- end -}}

{{/* Source of a volume with the certificate of a CA alone: (list secret key). CloudNativePG's Secret has the CA's key, too. */}}
{{- define "prefect-server.caSource" -}}
secretName: {{ index . 0 | quote }}
items: [{key: {{ index . 1 | quote }}, path: {{ index . 1 | quote }}}]
{{- end -}}

{{/* Variables of libpq for a database of the chart. asyncpg reads them, too. */}}
{{- define "prefect-server.databaseTlsEnv" -}}
{{- with include "prefect-server.databaseCa" . }}
- {name: PGSSLMODE, value: verify-full}
- {name: PGSSLROOTCERT, value: {{ . }}}
{{- end }}
{{- end -}}
