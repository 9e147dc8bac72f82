{{/* Rules across values: each names the key and the cure. Those of single values are in values.schema.json. */}}
{{- define "prefect-server.validate" -}}
{{- $values := .Values -}}
{{- if not (or $values.image.tag $values.image.digest) -}}
{{- fail "image.tag is empty. Set it to a tag that `make push` printed, or image.digest; `make deploy` does so" -}}
{{- end -}}
{{- if eq $values.image.tag "latest" -}}
{{- fail "image.tag is `latest`, which changes under a running release. Set a tag that stays, or image.digest" -}}
{{- end -}}
{{- if and $values.database.external.existingSecret $values.database.bundled.enabled -}}
{{- fail "database.external.existingSecret and database.bundled.enabled are both set. Set database.bundled.enabled=false to use the external one, or leave the Secret empty" -}}
{{- end -}}
{{- if not (or $values.database.external.existingSecret $values.database.bundled.enabled) -}}
{{- fail "There is no database. Set database.external.existingSecret to a Secret with its URL, or database.bundled.enabled=true" -}}
{{- end -}}
{{- if and $values.redis.external.existingSecret $values.redis.bundled.enabled -}}
{{- fail "redis.external.existingSecret and redis.bundled.enabled are both set. Set redis.bundled.enabled=false to use the external one, or leave the Secret empty" -}}
{{- end -}}
{{- $redis := include "prefect-server.redis" . -}}
{{- if and $values.services.separate (not $redis) -}}
{{- fail "services.separate=true needs a Redis: events would stay in the API's memory. Set redis.bundled.enabled=true or redis.external.existingSecret, or services.separate=false" -}}
{{- end -}}
{{- $replicas := ternary $values.api.autoscaling.maxReplicas $values.api.replicas $values.api.autoscaling.enabled -}}
{{- if and (gt (int $replicas) 1) (not $redis) -}}
{{- fail "api.replicas (or api.autoscaling.maxReplicas) over 1 needs a Redis: runs would be scheduled twice. Set redis.bundled.enabled=true or redis.external.existingSecret" -}}
{{- end -}}
{{- if and (gt (int $replicas) 1) (not $values.services.separate) -}}
{{- fail "api.replicas (or api.autoscaling.maxReplicas) over 1 needs services.separate=true: each API pod would run all services" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.enabled=true needs ingress.hosts: [{host: prefect.example.com, paths: [{path: /, pathType: Prefix}]}]" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled=true needs httpRoute.parentRefs: [{name: GATEWAY, namespace: NAMESPACE}]" -}}
{{- end -}}
{{- if and $values.api.autoscaling.enabled (not (dig "requests" "cpu" "" $values.api.resources)) -}}
{{- fail "api.autoscaling.enabled=true needs api.resources.requests.cpu: the utilisation is measured against it" -}}
{{- end -}}
{{- include "prefect-server.validateSecrets" . -}}
{{- end -}}

{{/* A Secret that is missing keeps pods from starting; where the cluster can be asked, that is said before. */}}
{{- define "prefect-server.validateSecrets" -}}
{{- $root := . -}}
{{- $references := list
  (dict "path" "auth.existingSecret" "name" .Values.auth.existingSecret "key" .Values.auth.key)
  (dict "path" "database.external.existingSecret" "name" .Values.database.external.existingSecret "key" .Values.database.external.key)
  (dict "path" "database.bundled.existingSecret" "name" .Values.database.bundled.existingSecret "key" "password")
  (dict "path" "redis.external.existingSecret" "name" .Values.redis.external.existingSecret "key" .Values.redis.external.key)
  (dict "path" "redis.bundled.existingSecret" "name" .Values.redis.bundled.existingSecret "key" "password") -}}
{{- if lookup "v1" "Namespace" "" .Release.Namespace -}}
{{- range $references -}}
{{- if .name -}}
{{- $secret := lookup "v1" "Secret" $root.Release.Namespace .name -}}
{{- if not $secret -}}
{{- fail (printf "%s names a Secret %s that namespace %s does not have. Create it: kubectl --namespace %s create secret generic %s --from-literal=%s=..." .path .name $root.Release.Namespace $root.Release.Namespace .name .key) -}}
{{- end -}}
{{- if not (hasKey ($secret.data | default dict) .key) -}}
{{- fail (printf "%s: Secret %s in namespace %s has no key %s. It has: %s" .path .name $root.Release.Namespace .key (keys ($secret.data | default dict) | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
