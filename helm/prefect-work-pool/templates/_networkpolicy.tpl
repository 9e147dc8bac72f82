{{/* Egress that several policies share. */}}

{{- define "prefect-work-pool.dnsEgress" -}}
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

{{- define "prefect-work-pool.kubernetesEgress" -}}
- to:
    {{- range .Values.networkPolicy.kubernetesCIDRs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.kubernetesPorts }}
    - {port: {{ int64 . }}}
    {{- end }}
{{- end -}}

{{- define "prefect-work-pool.apiEgress" -}}
{{- with .Values.networkPolicy.api -}}
- to:
    - podSelector:
        matchLabels: {{- toYaml .podLabels | nindent 10 }}
      {{- with .namespaceLabels }}
      namespaceSelector:
        matchLabels: {{- toYaml . | nindent 10 }}
      {{- end }}
  ports: [{port: {{ int64 .port }}}]
{{- range .cidrs }}
- to: [{ipBlock: {cidr: {{ . | quote }}}}]
{{- end }}
{{- end }}
{{- end -}}
