{{/* Secrets that the chart makes where none is named. What is in the cluster already is kept, so that an
     upgrade changes no password; without access to the cluster (`helm template`) they are new each time. */}}

{{/* A value of an existing Secret, or 32 new characters: (list root secret key). */}}
{{- define "prefect-server.kept" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- if and $found (hasKey ($found.data | default dict) (index . 2)) -}}
{{- index $found.data (index . 2) | b64dec -}}
{{- else -}}
{{- randAlphaNum 32 -}}
{{- end -}}
{{- end -}}

{{/* What of the Secrets makes pods start anew when it changes: names and keys, not the values, which the chart
     does not see where a person keeps them. */}}
{{- define "prefect-server.secrets" -}}
{{- list (include "prefect-server.authSecret" .) .Values.auth.key (include "prefect-server.databaseSecret" .) (include "prefect-server.redisSecret" .) .Values.database.external .Values.redis.external | toJson -}}
{{- end -}}
