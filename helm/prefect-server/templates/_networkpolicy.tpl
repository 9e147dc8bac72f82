{{/* Egress that several policies share. */}}

{{- define "prefect-server.dnsEgress" -}}
- to:
    - namespaceSelector:
        matchLabels: {{- toYaml .Values.networkPolicy.dns.namespaceLabels | nindent 10 }}
      podSelector:
        matchLabels: {{- toYaml .Values.networkPolicy.dns.podLabels | nindent 10 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    # CoreDNS may listen elsewhere than its service does.
    - {port: dns, protocol: UDP}
    - {port: dns-tcp, protocol: TCP}
{{- end -}}

{{/* To the chart's own pods: (list root component port). */}}
{{- define "prefect-server.ownEgress" -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "prefect-server.selector" . | nindent 10 }}
  ports: [{port: {{ index . 2 }}}]
{{- end -}}

{{/* Ingress from the chart's own pods: (list root port components...). */}}
{{- define "prefect-server.ownIngress" -}}
{{- $root := index . 0 -}}
- from:
    {{- range slice . 2 }}
    - podSelector:
        matchLabels:
          {{- include "prefect-server.selector" (list $root .) | nindent 10 }}
    {{- end }}
  ports: [{port: {{ index . 1 }}}]
{{- end -}}
