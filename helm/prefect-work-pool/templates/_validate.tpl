{{/* Rules across values: each names the key and the cure. Those of single values are in values.schema.json. */}}
{{- define "prefect-work-pool.validate" -}}
{{- $values := .Values -}}
{{- if not (or $values.image.tag $values.image.digest) -}}
{{- fail "image.tag is empty. Set it to a tag that `make push` printed, or image.digest; `make deploy` does so" -}}
{{- end -}}
{{- range $image := list $values.image $values.runs.image -}}
{{- if eq ($image.tag | default "") "latest" -}}
{{- fail "image.tag (or runs.image.tag) is `latest`, which changes under a running release. Set a tag that stays, or a digest" -}}
{{- end -}}
{{- end -}}
{{- if hasPrefix "prefect" (lower $values.pool.name) -}}
{{- fail (printf "pool.name %q starts with `prefect`, which the server keeps for itself. Choose another name" $values.pool.name) -}}
{{- end -}}
{{- $queues := list "default" -}}
{{- range $values.pool.queues -}}{{- $queues = append $queues .name -}}{{- end -}}
{{- range $values.worker.queues -}}
{{- if not (has . $queues) -}}
{{- fail (printf "worker.queues names %q, which pool.queues does not have: %s" . (join ", " $queues)) -}}
{{- end -}}
{{- end -}}
{{- if $values.runs.pod.sidecars -}}
{{- fail "runs.pod.sidecars would keep a run's Job from ending. Put them into runs.pod.initContainers with restartPolicy: Always" -}}
{{- end -}}
{{- if and $values.worker.autoscaling.enabled (not (dig "requests" "cpu" "" $values.worker.resources)) -}}
{{- fail "worker.autoscaling.enabled=true needs worker.resources.requests.cpu: the utilisation is measured against it" -}}
{{- end -}}
{{- if and (not $values.worker.serviceAccount.create) (not $values.worker.serviceAccount.name) -}}
{{- fail "worker.serviceAccount.create=false needs worker.serviceAccount.name: the default account would get the right to make Jobs" -}}
{{- end -}}
{{- $prefetch := int $values.worker.prefetchSeconds -}}
{{- with $values.runs.activeDeadlineSeconds -}}
{{- if le (int .) $prefetch -}}
{{- fail "runs.activeDeadlineSeconds is not above worker.prefetchSeconds: a run that is submitted early would be ended before its time. Set it higher" -}}
{{- end -}}
{{- end -}}
{{- include "prefect-work-pool.validateSecret" . -}}
{{- end -}}

{{/* A Secret that is missing keeps pods from starting; where the cluster can be asked, that is said before. */}}
{{- define "prefect-work-pool.validateSecret" -}}
{{- $name := .Values.api.auth.existingSecret -}}
{{- if and $name (lookup "v1" "Namespace" "" .Release.Namespace) -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace $name -}}
{{- if not $secret -}}
{{- fail (printf "api.auth.existingSecret: there is no Secret %s in namespace %s. Install the server there first, create it (kubectl --namespace %s create secret generic %s --from-literal=%s=USER:PASSWORD), or set api.auth.existingSecret= for a server without a password" $name .Release.Namespace .Release.Namespace $name .Values.api.auth.key) -}}
{{- end -}}
{{- if not (hasKey ($secret.data | default dict) .Values.api.auth.key) -}}
{{- fail (printf "api.auth.key: Secret %s in namespace %s has no key %s. It has: %s" $name .Release.Namespace .Values.api.auth.key (keys ($secret.data | default dict) | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
