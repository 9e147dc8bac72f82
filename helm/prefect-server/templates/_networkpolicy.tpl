{{/* Egress and ingress rules that several NetworkPolicies share. */}}

{{- define "prefect-server.dnsEgress" -}}
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

{{/* Egress to a component of the chart: (list root component port). */}}
{{- define "prefect-server.ownEgress" -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "prefect-server.selector" . | nindent 10 }}
  ports: [{port: {{ index . 2 }}}]
{{- end -}}

{{/* Egress to the database's pods. Empty if the database is external. */}}
{{- define "prefect-server.databaseEgress" -}}
{{- $mode := include "prefect-server.databaseMode" . -}}
{{- if eq $mode "bundled" -}}
{{- include "prefect-server.ownEgress" (list . "database" 5432) -}}
{{- else if eq $mode "cnpg" -}}
- to:
    {{- include "prefect-server.cnpgPeers" . | trim | nindent 4 }}
  ports: [{port: 5432}]
{{- end -}}
{{- end -}}

{{/* Ingress from components of the chart: (list root port components...). */}}
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

{{/* Peer for an address range, without the ranges of networkPolicy.exceptCIDRs: (list root cidr). */}}
{{- define "prefect-server.addressPeer" -}}
{{- $cidr := index . 1 -}}
{{- $except := list -}}
{{- range (index . 0).Values.networkPolicy.exceptCIDRs -}}
{{- if eq (include "prefect-server.within" (list . $cidr)) "true" -}}{{- $except = append $except . -}}{{- end -}}
{{- end -}}
ipBlock: {cidr: {{ $cidr | quote }}{{ with $except }}, except: {{ toJson . }}{{ end }}}
{{- end -}}

{{/* Network prefix of an IPv4 or IPv6 range, as a text of ones and zeros. */}}
{{- define "prefect-server.prefixBits" -}}
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
{{- define "prefect-server.within" -}}
{{- $part := include "prefect-server.prefixBits" (index . 0) -}}
{{- $whole := include "prefect-server.prefixBits" (index . 1) -}}
{{- $same := eq (contains ":" (index . 0)) (contains ":" (index . 1)) -}}
{{- and $same (gt (len $part) (len $whole)) (hasPrefix $whole $part) -}}
{{- end -}}
