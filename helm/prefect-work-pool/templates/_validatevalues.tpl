{{/* Rules of values after their templates are rendered. The schema accepts text with {{ }}, which may render to something that
     Kubernetes refuses. */}}

{{/* Name of an object or a host: (list path name). A name in the values of runs may be a job variable. */}}
{{- define "prefect-work-pool.validateName" -}}
{{- $name := index . 1 -}}
{{- $ofRun := and (hasPrefix "runs." (index . 0)) (contains "{{" $name) -}}
{{- if not (or $ofRun (and (le (len $name) 253) (regexMatch "^(\\*\\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$" $name))) -}}
{{- fail (printf "%s names %q: a name has up to 253 lower-case letters, digits, - and . and begins and ends with a letter or a digit. Choose another name, or correct its template." (index . 0) $name) -}}
{{- end -}}
{{- end -}}

{{/* Label values of a selector: (list path labels). */}}
{{- define "prefect-work-pool.validateSelected" -}}
{{- range $key, $value := index . 1 -}}
{{- $ofRun := and (hasPrefix "runs." (index $ 0)) (contains "{{" $value) -}}
{{- if not (or $ofRun (regexMatch "^(([A-Za-z0-9][A-Za-z0-9_.-]{0,61})?[A-Za-z0-9])?$" $value)) -}}
{{- fail (printf "%s selects %s=%q: a label's value has up to 63 letters, digits, - _ . and begins and ends with a letter or a digit. Choose another value, or correct its template." (index $ 0) $key $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels and expressions of a selector: (list path selector). */}}
{{- define "prefect-work-pool.validateSelector" -}}
{{- $selector := index . 1 | default dict -}}
{{- include "prefect-work-pool.validateSelected" (list (index . 0) ($selector.matchLabels | default dict)) -}}
{{- range $expression := $selector.matchExpressions -}}
{{- range $expression.values -}}
{{- include "prefect-work-pool.validateSelected" (list (index $ 0) (dict $expression.key .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* References of environment variables: (list prefix env envFrom). Templates are rendered. The prefix is that of both keys. */}}
{{- define "prefect-work-pool.validateReferences" -}}
{{- $prefix := index . 0 -}}
{{- range index . 1 -}}
{{- $source := .valueFrom | default dict -}}
{{- range $reference := list $source.secretKeyRef $source.configMapKeyRef -}}
{{- with $reference -}}{{- include "prefect-work-pool.validateName" (list (printf "%senv" $prefix) .name) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range index . 2 -}}
{{- range $reference := list .secretRef .configMapRef -}}
{{- with $reference -}}{{- include "prefect-work-pool.validateName" (list (printf "%senvFrom" $prefix) .name) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Peers of a NetworkPolicy: (list path peers). */}}
{{- define "prefect-work-pool.validatePeers" -}}
{{- $path := index . 0 -}}
{{- range index . 1 -}}
{{- include "prefect-work-pool.validateSelector" (list $path .podSelector) -}}
{{- include "prefect-work-pool.validateSelector" (list $path .namespaceSelector) -}}
{{- with .ipBlock -}}
{{- $cidr := .cidr -}}
{{- range .except -}}
{{- if ne (include "prefect-work-pool.within" (list . $cidr)) "true" -}}
{{- fail (printf "%s.ipBlock.except has %s: this range is not inside the cidr %s. Remove the exception, or correct one of the two." $path . $cidr) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Egress rules: (list path rules). */}}
{{- define "prefect-work-pool.validateEgress" -}}
{{- $path := index . 0 -}}
{{- range index . 1 -}}
{{- include "prefect-work-pool.validatePeers" (list (printf "%s.to" $path) .to) -}}
{{- range .ports -}}
{{- if and .endPort (lt (int64 .endPort) (int64 .port)) -}}
{{- fail (printf "%s.ports has endPort %d below port %d: the range is empty. Raise endPort." $path (int64 .endPort) (int64 .port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
