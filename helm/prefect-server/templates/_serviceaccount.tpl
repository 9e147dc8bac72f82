{{/* Name of the ServiceAccount of a component other than API, services and migrations: (list root component). Nothing calls the
     Kubernetes API with it. */}}
{{- define "prefect-server.componentAccountName" -}}
{{- $account := (index . 0).Values.serviceAccount -}}
{{- if $account.create -}}
{{- printf "%s-%s" (include "prefect-server.fullname" (index . 0)) (index . 1) -}}
{{- else -}}
{{- $account.name -}}
{{- end -}}
{{- end -}}

{{/* That ServiceAccount: (list root component annotations). */}}
{{- define "prefect-server.componentAccount" -}}
{{- if (index . 0).Values.serviceAccount.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "prefect-server.metadata" (dict "root" (index . 0) "component" (index . 1) "annotations" (index . 2)) | nindent 2 }}
automountServiceAccountToken: false
{{- end -}}
{{- end -}}
