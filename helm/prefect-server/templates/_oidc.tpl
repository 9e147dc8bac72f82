{{/* Rules and arguments of the component oidc: oauth2-proxy, which logs people in. */}}

{{- define "prefect-server.validateOidc" -}}
{{- with .Values.oidc -}}
{{- if .enabled -}}
{{- if not (include "prefect-server.roles" $) -}}
{{- fail "oidc.enabled=true needs auth.enabled and auth.roles.enabled: without API roles the server knows no groups, and has one password. Set both to true, or oidc.enabled=false." -}}
{{- end -}}
{{- if and .directHosts (not (or $.Values.ingress.enabled $.Values.httpRoute.enabled)) -}}
{{- fail "oidc.directHosts is set without ingress.enabled and httpRoute.enabled: no host leads to the API. Enable one of the two, or leave oidc.directHosts empty." -}}
{{- end -}}
{{- range $key := list "issuerUrl" "clientId" "existingSecret" -}}
{{- if not (index $.Values.oidc $key) -}}
{{- fail (printf "oidc.enabled=true needs oidc.%s: oauth2-proxy cannot log in at the identity provider. Set oidc.%s." $key $key) -}}
{{- end -}}
{{- end -}}
{{- if not (concat .groups.operator .groups.viewer) -}}
{{- fail "oidc.groups names no group: every person would be refused. Name a group of the identity provider in oidc.groups.operator or oidc.groups.viewer." -}}
{{- end -}}
{{- if not (or .image.tag .image.digest) -}}
{{- fail "oidc.image.tag is empty: the image has no version. Set oidc.image.tag or oidc.image.digest." -}}
{{- end -}}
{{- $hosts := list -}}
{{- range ternary $.Values.ingress.hosts list $.Values.ingress.enabled -}}
{{- $hosts = append $hosts .host -}}
{{- $known := list -}}
{{- range .paths -}}
{{- if ne .pathType "Exact" -}}{{- $known = append $known (trimSuffix "/" .path) -}}{{- end -}}
{{- end -}}
{{- if and .paths (not (or (has "" $known) (has "/oauth2" $known) (has .host $.Values.oidc.directHosts) (contains "--proxy-prefix=" (join " " $.Values.oidc.extraArgs)))) -}}
{{- fail (printf "ingress.hosts has no path /oauth2 for %s: the identity provider sends people to /oauth2/callback. Add {path: /oauth2, pathType: Prefix}, or set --proxy-prefix in oidc.extraArgs." .host) -}}
{{- end -}}
{{- end -}}
{{- with $.Values.httpRoute -}}
{{- if .enabled -}}{{- $hosts = concat $hosts (.hostnames | default $.Values.oidc.directHosts) -}}{{- end -}}
{{- end -}}
{{- range .directHosts -}}
{{- if not (has . $hosts) -}}
{{- fail (printf "oidc.directHosts names %s: neither ingress.hosts nor httpRoute.hostnames has this host. Add the host there, or remove it from oidc.directHosts." .) -}}
{{- end -}}
{{- end -}}
{{- include "prefect-server.validateOidcEnv" $ -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that oauth2-proxy would not read: those of the chart, and settings that an argument sets. */}}
{{- define "prefect-server.validateOidcEnv" -}}
{{- $own := list -}}
{{- range include "prefect-server.oidcOwnEnv" . | fromYamlArray -}}{{- $own = append $own .name -}}{{- end -}}
{{- $arguments := dict -}}
{{- range include "prefect-server.oidcArgs" . | fromYamlArray -}}
{{- $argument := regexFind "^--[a-z0-9-]+" . -}}
{{- $name := printf "OAUTH2_PROXY_%s" (trimPrefix "--" $argument | upper | replace "-" "_") -}}
{{- /* Variables of lists are plural. */ -}}
{{- range list $name (printf "%sS" $name) -}}{{- $_ := set $arguments . $argument -}}{{- end -}}
{{- end -}}
{{- range .Values.oidc.env -}}
{{- $name := .name -}}
{{- if has .name $own -}}
{{- fail (printf "oidc.env has %s: the chart sets this variable. Remove it from oidc.env." .name) -}}
{{- end -}}
{{- with get $arguments .name -}}
{{- fail (printf "oidc.env has %s: the argument %s of oauth2-proxy wins over this variable. Put %s into oidc.extraArgs instead." $name . .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that the chart sets, as a YAML list. */}}
{{- define "prefect-server.oidcOwnEnv" -}}
- name: OAUTH2_PROXY_CLIENT_SECRET
  valueFrom: {secretKeyRef: {name: {{ .Values.oidc.existingSecret | quote }}, key: client-secret}}
- name: OAUTH2_PROXY_COOKIE_SECRET
  valueFrom: {secretKeyRef: {name: {{ .Values.oidc.existingSecret | quote }}, key: cookie-secret}}
# With this password the API believes the headers that name a person and the person's groups.
- name: OAUTH2_PROXY_BASIC_AUTH_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.rolesSecret" . | quote }}, key: oidc-key}}
{{- if .Values.tls.enabled }}
# The image's certificates, for the identity provider, and the CA of the API.
- {name: SSL_CERT_DIR, value: "/etc/ssl/certs:/etc/prefect-tls"}
{{- end }}
{{- end -}}

{{/* HTTPRoutes, as a YAML list: the suffix of each name, the component that the route leads to, and the host names. A route
     without host names gets the requests for all hosts that no other route of its gateways names. */}}
{{- define "prefect-server.routes" -}}
{{- $hosts := .Values.httpRoute.hostnames -}}
{{- $ofMain := list -}}
{{- $direct := list -}}
{{- if .Values.oidc.enabled -}}{{- $direct = ternary list .Values.oidc.directHosts (not (empty $hosts)) -}}{{- end -}}
{{- range $hosts -}}
{{- if eq (include "prefect-server.entry" (list $ .)) (include "prefect-server.entry" (list $ "")) -}}
{{- $ofMain = append $ofMain . -}}
{{- else -}}
{{- $direct = append $direct . -}}
{{- end -}}
{{- end -}}
{{- if or $ofMain (not $hosts) }}
- {{ dict "suffix" "api" "component" (include "prefect-server.entry" (list . "")) "hostnames" $ofMain | toJson }}
{{- end -}}
{{- if $direct }}
- {{ dict "suffix" "api-direct" "component" "api" "hostnames" $direct | toJson }}
{{- end -}}
{{- end -}}

{{/* Component that Ingress and HTTPRoute lead to: (list root host). */}}
{{- define "prefect-server.entry" -}}
{{- $oidc := (index . 0).Values.oidc -}}
{{- ternary "oidc" "api" (and $oidc.enabled (not (has (index . 1) $oidc.directHosts))) -}}
{{- end -}}

{{/* Port of oauth2-proxy. */}}
{{- define "prefect-server.oidcPort" -}}4180{{- end -}}

{{/* Arguments of oauth2-proxy, as a YAML list. The last value of an argument wins, so those of the user are at
     the end. Arguments that are lists add up. */}}
{{- define "prefect-server.oidcArgs" -}}
{{- $base := regexQuoteMeta .Values.api.basePath -}}
- --provider=oidc
- {{ printf "--oidc-issuer-url=%s" .Values.oidc.issuerUrl | quote }}
- {{ printf "--client-id=%s" .Values.oidc.clientId | quote }}
- --code-challenge-method=S256
- --insecure-oidc-skip-nonce=false
- --skip-provider-button=true
{{- range uniq (concat .Values.oidc.groups.operator .Values.oidc.groups.viewer) }}
- {{ printf "--allowed-group=%s" . | quote }}
{{- end }}
{{- /* Values of a list add up: next to "*" another domain changes nothing. */}}
{{- if not (regexMatch "(^|\\s)--email-domain\\b" (join " " .Values.oidc.extraArgs)) }}
- --email-domain=*
{{- end }}
{{- if .Values.tls.enabled }}
- --https-address=0.0.0.0:{{ include "prefect-server.oidcPort" . }}
- --tls-cert-file=/etc/prefect-tls/tls.crt
- --tls-key-file=/etc/prefect-tls/tls.key
{{- /* Without it, a file of --provider-ca-file would replace the CA of the API, too. */}}
- --use-system-trust-store=true
{{- else }}
- --http-address=0.0.0.0:{{ include "prefect-server.oidcPort" . }}
{{- end }}
- --upstream={{ include "prefect-server.scheme" . }}://{{ include "prefect-server.fullname" . }}-api:{{ int64 .Values.service.port }}
- --upstream-timeout=120s
- --prefer-email-to-user=true
- --cookie-name=__Host-prefect
- --cookie-samesite=lax
- --cookie-expire=8h
- --cookie-csrf-per-request=true
- --cookie-csrf-per-request-limit=5
- --session-cookie-minimal=true
- {{ printf "--api-route=^%s/" $base | quote }}
- --api-route=/ui-settings$
- {{ printf "--skip-auth-route=GET=^%s/(health|ready)$" $base | quote }}
{{- /* Browsers fetch this file of the UI without cookies. */}}
- --skip-auth-route=GET=/ico/site\.webmanifest$
- --ping-path=/oauth2/ping
- --ready-path=/oauth2/ready
- --request-logging=false
{{- range .Values.oidc.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
