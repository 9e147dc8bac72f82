{{/* Egress and ingress rules that several NetworkPolicies share. */}}

{{- define "prefect-work-pool.dnsEgress" -}}
- to:
    - namespaceSelector:
        matchLabels: {{- toYaml .Values.networkPolicy.dns.namespaceLabels | nindent 10 }}
      podSelector:
        matchLabels: {{- toYaml .Values.networkPolicy.dns.podLabels | nindent 10 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    # CoreDNS may listen on other ports than its Service.
    - {port: dns, protocol: UDP}
    - {port: dns-tcp, protocol: TCP}
{{- end -}}

{{- define "prefect-work-pool.kubernetesEgress" -}}
- to:
    {{- range .Values.networkPolicy.kubernetesCIDRs }}
    - {{ include "prefect-work-pool.addressPeer" (list $ .) }}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.kubernetesPorts }}
    - {port: {{ int64 . }}}
    {{- end }}
{{- end -}}

{{/* Port of the API at api.url. */}}
{{- define "prefect-work-pool.apiPort" -}}
{{- $url := urlParse (include "prefect-work-pool.line" (list . "api.url" .Values.api.url)) -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary 443 80 (eq $url.scheme "https")) -}}
{{- end -}}

{{- define "prefect-work-pool.apiEgress" -}}
{{- include "prefect-work-pool.apiEgressFrom" (list . .Release.Namespace) -}}
{{- end -}}

{{/* Egress to the API from pods of a namespace: (list root namespace). */}}
{{- define "prefect-work-pool.apiEgressFrom" -}}
{{- $root := index . 0 -}}
{{- $own := ternary dict (dict "kubernetes.io/metadata.name" $root.Release.Namespace) (eq (index . 1) $root.Release.Namespace) -}}
{{- with $root.Values.networkPolicy.api -}}
- to:
    - podSelector:
        matchLabels: {{- toYaml .podLabels | nindent 10 }}
      {{- with .namespaceLabels | default $own }}
      namespaceSelector:
        matchLabels: {{- toYaml . | nindent 10 }}
      {{- end }}
  ports: [{port: {{ int64 .port }}}]
{{- range .cidrs }}
- to: [{ {{- include "prefect-work-pool.addressPeer" (list $root .) -}} }]
  ports: [{port: {{ include "prefect-work-pool.apiPort" $root }}}]
{{- end }}
{{- end }}
{{- end -}}

{{/* Peer for an address range, without the ranges of networkPolicy.exceptCIDRs: (list root cidr). */}}
{{- define "prefect-work-pool.addressPeer" -}}
{{- $cidr := index . 1 -}}
{{- $except := list -}}
{{- range (index . 0).Values.networkPolicy.exceptCIDRs -}}
{{- if eq (include "prefect-work-pool.within" (list . $cidr)) "true" -}}{{- $except = append $except . -}}{{- end -}}
{{- end -}}
ipBlock: {cidr: {{ $cidr | quote }}{{ with $except }}, except: {{ toJson . }}{{ end }}}
{{- end -}}

{{/* Network prefix of an IPv4 or IPv6 range, as a text of ones and zeros. */}}
{{- define "prefect-work-pool.prefixBits" -}}
{{- $range := splitList "/" . -}}
{{- $bits := "" -}}
{{- if contains ":" . -}}
{{- $halves := splitList "::" (index $range 0) -}}
{{- $groups := without (splitList ":" (index $halves 0)) "" -}}
{{- if gt (len $halves) 1 -}}
{{- $last := without (splitList ":" (index $halves 1)) "" -}}
{{- range until (sub (sub 8 (len $groups)) (len $last) | int) -}}{{- $groups = append $groups "0" -}}{{- end -}}
{{- $groups = concat $groups $last -}}
{{- end -}}
{{- range $groups -}}{{- $bits = printf "%s%016b" $bits (int64 (printf "0x%s" .)) -}}{{- end -}}
{{- else -}}
{{- range splitList "." (index $range 0) -}}{{- $bits = printf "%s%08b" $bits (int64 .) -}}{{- end -}}
{{- end -}}
{{- trunc (index $range 1 | int) $bits -}}
{{- end -}}

{{/* "true" if the first range lies inside the second and is smaller: (list cidr cidr). */}}
{{- define "prefect-work-pool.within" -}}
{{- $part := include "prefect-work-pool.prefixBits" (index . 0) -}}
{{- $whole := include "prefect-work-pool.prefixBits" (index . 1) -}}
{{- $same := eq (contains ":" (index . 0)) (contains ":" (index . 1)) -}}
{{- and $same (gt (len $part) (len $whole)) (hasPrefix $whole $part) -}}
{{- end -}}
