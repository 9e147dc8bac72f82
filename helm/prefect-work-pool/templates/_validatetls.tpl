{{/* Rules of TLS of the Prefect API. */}}

{{- define "prefect-work-pool.validateTls" -}}
{{- $secret := .Values.api.tls.caSecret -}}
{{- if $secret -}}
{{- if not (hasPrefix "https://" (include "prefect-work-pool.apiUrl" .)) -}}
{{- fail (printf "api.tls.caSecret is set and api.url is %s: a certificate has no use without HTTPS. Begin api.url with https://, or leave api.tls.caSecret empty." (include "prefect-work-pool.apiUrl" .)) -}}
{{- end -}}
{{- range $path, $settings := dict "settings" .Values.settings "worker.settings" .Values.worker.settings "runs.settings" .Values.runs.settings "sync.settings" .Values.sync.settings "drift.settings" .Values.drift.settings "reconciler.settings" .Values.reconciler.settings -}}
{{- range $name := list "PREFECT_API_SSL_CERT_FILE" "PREFECT_API_TLS_INSECURE_SKIP_VERIFY" -}}
{{- if hasKey $settings $name -}}
{{- fail (printf "%s.%s and api.tls.caSecret are both set: clients would not check the API's certificate against this CA. Remove the setting, or leave api.tls.caSecret empty." $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $namespace := include "prefect-work-pool.runsNamespace" . -}}
{{- $found := (lookup "v1" "Secret" $namespace $secret).data | default dict -}}
{{- if hasKey $found "tls.key" -}}
{{- fail (printf "api.tls.caSecret names the Secret %s, which has a private key in namespace %s: pods of runs could mount it, and pose as the API. Create a Secret with the CA's certificate alone." $secret $namespace) -}}
{{- end -}}
{{- end -}}
{{- end -}}
