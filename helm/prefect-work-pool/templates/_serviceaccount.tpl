{{/* ServiceAccount of a component: (list root component), and a namespace other than the release's. Each pod decides whether it mounts the token. */}}
{{- define "prefect-work-pool.serviceAccount" -}}
{{- $account := (index (index . 0).Values (index . 1)).serviceAccount -}}
{{- if $account.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "prefect-work-pool.metadata" (dict "root" (index . 0) "component" (index . 1) "namespace" (rest (rest .) | first) "name" (include "prefect-work-pool.serviceAccountName" .) "path" (printf "%s.serviceAccount" (index . 1)) "labels" $account.labels "annotations" $account.annotations) | nindent 2 }}
automountServiceAccountToken: false
{{- end }}
{{- end -}}

{{/* ServiceAccount of a component that has none in the values, and does not call the Kubernetes API: (list root component
     annotations), and a namespace other than the release's. Its name is the component's. */}}
{{- define "prefect-work-pool.componentAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "prefect-work-pool.metadata" (dict "root" (index . 0) "component" (index . 1) "annotations" (index . 2) "namespace" (slice . 3 | first)) | nindent 2 }}
automountServiceAccountToken: false
{{- end -}}
