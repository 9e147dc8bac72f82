{{/* Objects that the pods of runs refer to, by kind: (list root spec). They include the Secrets with the worker's credentials,
     which the worker adds to each Job. */}}
{{- define "prefect-work-pool.referenced" -}}
{{- $root := index . 0 -}}
{{- $spec := index . 1 -}}
{{- $found := dict "secrets" list "configMaps" list "claims" list "volumes" list "images" list -}}
{{- range include "prefect-work-pool.env" (list $root "worker") | fromYamlArray -}}
{{- if and .value (hasPrefix "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_" .name) (hasSuffix "_SECRET_NAME" .name) -}}
{{- $_ := set $found "secrets" (append $found.secrets .value) -}}
{{- end -}}
{{- end -}}
{{- range concat $spec.containers ($spec.initContainers | default list) -}}
{{- $_ := set $found "images" (append $found.images .image) -}}
{{- range .env -}}
{{- with ((.valueFrom | default dict).secretKeyRef | default dict).name -}}{{- $_ := set $found "secrets" (append $found.secrets .) -}}{{- end -}}
{{- with ((.valueFrom | default dict).configMapKeyRef | default dict).name -}}{{- $_ := set $found "configMaps" (append $found.configMaps .) -}}{{- end -}}
{{- end -}}
{{- range .envFrom -}}
{{- with (.secretRef | default dict).name -}}{{- $_ := set $found "secrets" (append $found.secrets .) -}}{{- end -}}
{{- with (.configMapRef | default dict).name -}}{{- $_ := set $found "configMaps" (append $found.configMaps .) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $spec.volumes -}}
{{- $_ := set $found "volumes" (append $found.volumes .name) -}}
{{- with (.secret | default dict).secretName -}}{{- $_ := set $found "secrets" (append $found.secrets .) -}}{{- end -}}
{{- with (.configMap | default dict).name -}}{{- $_ := set $found "configMaps" (append $found.configMaps .) -}}{{- end -}}
{{- with (.persistentVolumeClaim | default dict).claimName -}}{{- $_ := set $found "claims" (append $found.claims .) -}}{{- end -}}
{{- end -}}
{{- range $kind, $names := $found -}}{{- $_ := set $found $kind (uniq $names | sortAlpha) -}}{{- end -}}
{{- toYaml $found -}}
{{- end -}}
