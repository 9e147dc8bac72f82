{{/* TLS of the Prefect API: the CA's certificate in the pods of all components and runs, and the rules of its values. */}}

{{/* Volumes with the certificate of the API's CA, as a YAML list. */}}
{{- define "prefect-work-pool.caVolumes" -}}
{{- $volumes := list -}}
{{- with .Values.api.tls -}}
{{- if .caSecret -}}
{{- $volumes = list (dict "name" "api-ca" "secret" (dict "secretName" .caSecret "items" (list (dict "key" .caKey "path" "ca.crt")))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $volumes -}}
{{- end -}}

{{- define "prefect-work-pool.caMounts" -}}
{{- $mounts := list -}}
{{- if .Values.api.tls.caSecret -}}
{{- $mounts = list (dict "name" "api-ca" "mountPath" "/etc/prefect-api/ca" "readOnly" true) -}}
{{- end -}}
{{- toYaml $mounts -}}
{{- end -}}

{{/* Variable of all components and runs. SSL_CERT_FILE would also replace the public CAs that runs need elsewhere. */}}
{{- define "prefect-work-pool.caEnv" -}}
{{- if .Values.api.tls.caSecret }}
- {name: PREFECT_API_SSL_CERT_FILE, value: /etc/prefect-api/ca/ca.crt}
{{- end }}
{{- end -}}
