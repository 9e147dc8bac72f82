{{/* PodDisruptionBudget of a component that may have more than one pod: (list root component replicas). */}}
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
  # Pods that are not ready, as the database is away, must not block the drain of a node.
  unhealthyPodEvictionPolicy: AlwaysAllow
  {{- /* minAvailable may be 0. */}}
  {{- if ne (toString $budget.minAvailable) "" }}
  minAvailable: {{ include "prefect-work-pool.text" $budget.minAvailable }}
  {{- else }}
  maxUnavailable: {{ include "prefect-work-pool.text" $budget.maxUnavailable }}
  {{- end }}
{{- end -}}
{{- end -}}
