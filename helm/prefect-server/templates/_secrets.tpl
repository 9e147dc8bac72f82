{{/* Generated Secrets, where the values name no existing one. The chart keeps values that are in the cluster already, so that
     an upgrade changes no password. Without access to the cluster (`helm template`) each rendering has new values. */}}

{{/* Value of an existing Secret, or 32 random characters: (list root secret key). */}}
{{- define "prefect-server.kept" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- if and $found (hasKey ($found.data | default dict) (index . 2)) -}}
{{- index $found.data (index . 2) | b64dec -}}
{{- else -}}
{{- randAlphaNum 32 -}}
{{- end -}}
{{- end -}}

{{/* `value` or `valueFrom` of the login at the database, unless it is external. Existing Secrets need no key `username`. */}}
{{- define "prefect-server.databaseUser" -}}
{{- if and .Values.database.bundled.existingSecret (eq (include "prefect-server.databaseMode" .) "bundled") -}}
value: prefect
{{- else -}}
valueFrom: {secretKeyRef: {name: {{ include "prefect-server.databaseSecret" . | quote }}, key: username}}
{{- end -}}
{{- end -}}

{{/* Whether the API checks roles: "true", or empty. */}}
{{- define "prefect-server.roles" -}}
{{- if and .Values.auth.enabled .Values.auth.roles.enabled -}}true{{- end -}}
{{- end -}}

{{/* Name of the Secret with the credentials of the roles. */}}
{{- define "prefect-server.rolesSecret" -}}
{{- .Values.auth.roles.existingSecret | default (printf "%s-api-roles" (include "prefect-server.fullname" .)) -}}
{{- end -}}

{{/* Names and keys of the Secrets, as text for a checksum: pods restart when they change. The chart cannot see the values of
     existing Secrets. */}}
{{- define "prefect-server.secrets" -}}
{{- list (include "prefect-server.authSecret" .) .Values.auth.key (include "prefect-server.encryptionKeySecret" .) .Values.encryptionKey.key .Values.auth.roles (include "prefect-server.databaseSecret" .) (include "prefect-server.redisSecret" .) .Values.database.external .Values.redis.external (include "prefect-server.tlsSecret" .) | toJson -}}
{{- end -}}
