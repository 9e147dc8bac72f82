{{/* Rules of TLS inside the cluster. */}}

{{- define "prefect-server.validateTls" -}}
{{- $issuer := .Values.tls.certManager.issuerRef.name -}}
{{- with .Values.tls -}}
{{- if and .existingSecret $issuer -}}
{{- fail "tls.existingSecret and tls.certManager.issuerRef.name are both set: cert-manager would replace the certificate in the Secret. Leave one of them empty." -}}
{{- end -}}
{{- if and .enabled (not .existingSecret) (not $issuer) -}}
{{- fail "tls.enabled=true needs a certificate: tls.existingSecret and tls.certManager.issuerRef.name are empty. Name a Secret with tls.crt, tls.key and ca.crt, or an issuer of cert-manager." -}}
{{- end -}}
{{- if and (not .enabled) (or .existingSecret $issuer) -}}
{{- fail "tls.existingSecret or tls.certManager.issuerRef.name is set with tls.enabled=false: no component would use the certificate. Set tls.enabled=true, or leave both empty." -}}
{{- end -}}
{{- with .certManager -}}
{{- if ge (trimSuffix "h" .renewBefore | int64) (trimSuffix "h" .duration | int64) -}}
{{- fail (printf "tls.certManager.renewBefore (%s) is not below tls.certManager.duration (%s): the certificate would be renewed again and again. Lower renewBefore." .renewBefore .duration) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* Helm knows the kinds of the cluster only with access to it. */ -}}
{{- if and .Values.tls.enabled $issuer (lookup "v1" "Namespace" "" .Release.Namespace) (not (.Capabilities.APIVersions.Has "cert-manager.io/v1/Certificate")) -}}
{{- fail "tls.certManager.issuerRef.name is set, and the cluster does not know cert-manager.io/v1/Certificate: no certificate would be made. Install cert-manager, or name a Secret in tls.existingSecret." -}}
{{- end -}}
{{- if .Values.tls.enabled -}}{{- include "prefect-server.validateTlsUsers" . -}}{{- end -}}
{{- end -}}

{{/* Values that would leave a component without TLS, or a client without verification. */}}
{{- define "prefect-server.validateTlsUsers" -}}
{{- if .Values.api.args -}}
{{- fail "tls.enabled=true and api.args are both set: api.args replaces the command that serves HTTPS. Use api.extraArgs, or set tls.enabled=false." -}}
{{- end -}}
{{- $mode := include "prefect-server.databaseMode" . -}}
{{- range $key, $_ := (index .Values.database $mode).configuration -}}
{{- if has $key (list "ssl" "ssl_cert_file" "ssl_key_file" "hba_file") -}}
{{- fail (printf "database.%s.configuration.%s is set with tls.enabled=true: it would change the TLS of the database. Remove it from the configuration." $mode $key) -}}
{{- end -}}
{{- end -}}
{{- range $path, $settings := dict "settings" .Values.settings "api.settings" .Values.api.settings "services.settings" .Values.services.settings -}}
{{- if regexMatch "(?i)^(true|1)$" (include "prefect-server.text" (index $settings "PREFECT_API_TLS_INSECURE_SKIP_VERIFY")) -}}
{{- fail (printf "%s.PREFECT_API_TLS_INSECURE_SKIP_VERIFY is set with tls.enabled=true: the services would accept any certificate. Remove the setting." $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
