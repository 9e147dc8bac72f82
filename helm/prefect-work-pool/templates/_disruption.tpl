{{/* A PodDisruptionBudget where a component may have more than one pod: (list root component replicas). */}}
{{- define "prefect-work-pool.disruptionBudget" -}}
{{- $root := index . 0 -}}
{{- $budget := (index $root.Values (index . 1)).podDisruptionBudget -}}
{{- if and $budget.enabled (gt (int (index . 2)) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "prefect-work-pool.metadata" (dict "root" $root "component" (index . 1)) | nindent 2 }}
spec:
  selector:
    matchLabels:
      {{- include "prefect-work-pool.selector" (list $root (index . 1)) | nindent 6 }}
  {{- if $budget.minAvailable }}
  minAvailable: {{ $budget.minAvailable }}
  {{- else }}
  maxUnavailable: {{ $budget.maxUnavailable }}
  {{- end }}
{{- end -}}
{{- end -}}
