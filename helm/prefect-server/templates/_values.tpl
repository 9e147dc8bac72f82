{{/* Conversion of values for manifests: scalars to text, templates, merged lists. */}}

{{/* Scalar as text. Go would print numbers from 10^6 on with an exponent. */}}
{{- define "prefect-server.text" -}}
{{- if kindIs "string" . -}}{{ . }}{{- else -}}{{ toJson . }}{{- end -}}
{{- end -}}

{{/* Render the templates in a value, in place: (dict "root" "path" "value"). Text is a template if it uses one of Helm's
     objects (.Release, .Values, .Chart, .Capabilities, .Files, .Template) or functions (include, tpl, lookup), or if its
     action begins with a quoted text. Other text stays unchanged, such as templates of Vault or Consul in annotations.
     The path is in Helm's error messages. */}}
{{- define "prefect-server.fill" -}}
{{- if kindIs "string" .value -}}
{{- if regexMatch "\\{\\{(-? *([\"`]|(include|tpl|lookup) )|[^}]*\\.(Release|Values|Chart|Capabilities|Files|Template)\\b)" .value -}}
{{- $_ := set . "value" (tpl (printf "{{/* %s */}}%s" (.path | replace "*/" "") .value) .root) -}}
{{- end -}}
{{- else if kindIs "map" .value -}}
{{- $filled := dict -}}
{{- range $key, $entry := .value -}}
{{- $name := dict "root" $.root "path" $.path "value" $key -}}
{{- include "prefect-server.fill" $name -}}
{{- $part := dict "root" $.root "path" (printf "%s.%s" $.path $key) "value" $entry -}}
{{- include "prefect-server.fill" $part -}}
{{- $_ := set $filled $name.value $part.value -}}
{{- end -}}
{{- $_ := set . "value" $filled -}}
{{- else if kindIs "slice" .value -}}
{{- $filled := list -}}
{{- range $index, $entry := .value -}}
{{- $part := dict "root" $.root "path" (printf "%s[%d]" $.path $index) "value" $entry -}}
{{- include "prefect-server.fill" $part -}}
{{- $filled = append $filled $part.value -}}
{{- end -}}
{{- $_ := set . "value" $filled -}}
{{- end -}}
{{- end -}}

{{/* Value with its templates rendered, as YAML: (list root path value). */}}
{{- define "prefect-server.filled" -}}
{{- $part := dict "root" (index . 0) "path" (index . 1) "value" (index . 2) -}}
{{- include "prefect-server.fill" $part -}}
{{- toYaml $part.value -}}
{{- end -}}

{{/* Text with its templates rendered: (list root path text). */}}
{{- define "prefect-server.line" -}}
{{- $part := dict "root" (index . 0) "path" (index . 1) "value" (index . 2) -}}
{{- include "prefect-server.fill" $part -}}
{{- $part.value -}}
{{- end -}}

{{/* Two lists of objects merged by a key: (list key list list). The last object of a key wins. */}}
{{- define "prefect-server.byKey" -}}
{{- $key := index . 0 -}}
{{- $last := dict -}}
{{- $names := list -}}
{{- range $object := concat (index . 1 | default list) (index . 2 | default list) -}}
{{- $names = append $names (get $object $key) -}}
{{- $_ := set $last (get $object $key) $object -}}
{{- end -}}
{{- $merged := list -}}
{{- range uniq $names -}}{{- $merged = append $merged (get $last .) -}}{{- end -}}
{{- toYaml $merged -}}
{{- end -}}

{{/* `labels` of an object: (list root (the chart's labels) path (the object's labels)). The chart's labels win over those of
     the object, and these over commonLabels. */}}
{{- define "prefect-server.mergedLabels" -}}
{{- $root := index . 0 -}}
{{- $common := include "prefect-server.filled" (list $root "commonLabels" $root.Values.commonLabels) | fromYaml -}}
{{- $own := include "prefect-server.filled" (list $root (index . 2) (index . 3 | default dict)) | fromYaml -}}
{{- $labels := mergeOverwrite dict $common $own (index . 1) -}}
{{- range $key, $value := $labels -}}
{{- if not (or (regexMatch "^(([A-Za-z0-9][A-Za-z0-9_.-]{0,61})?[A-Za-z0-9])?$" $value) (and (eq (index $ 2) "runs.labels") (contains "{{" $value))) -}}
{{- fail (printf "%s.%s (or commonLabels) is %q: a label's value has up to 63 letters, digits, - _ . and begins and ends with a letter or a digit. Choose another value, or use an annotation." (index $ 2) $key $value) -}}
{{- end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end -}}

{{/* Quantities of a container as text. Null removes a default. */}}
{{- define "prefect-server.quantities" -}}
{{- $given := dict -}}
{{- range $name, $value := . -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $given $name (include "prefect-server.text" $value) -}}{{- end -}}
{{- end -}}
{{- toYaml $given -}}
{{- end -}}

{{/* `resources` of a container. */}}
{{- define "prefect-server.resources" -}}
{{- $given := dict -}}
{{- range $part, $quantities := . -}}
{{- if $quantities -}}{{- $_ := set $given $part (include "prefect-server.quantities" $quantities | fromYaml) -}}{{- end -}}
{{- end -}}
{{- toYaml $given -}}
{{- end -}}

{{/* `strategy` of a Deployment. Recreate has no rollingUpdate, which the default values would add. */}}
{{- define "prefect-server.strategy" -}}
{{- toYaml (ternary (omit . "rollingUpdate") . (eq .type "Recreate")) -}}
{{- end -}}

{{/* Name of a component's StatefulSet: (list root component). It is short, as Kubernetes puts it with a hash into a label. */}}
{{- define "prefect-server.statefulSet" -}}
{{- $suffix := printf "-%s" (index . 1) -}}
{{- printf "%s%s" (regexReplaceAll "-+$" (include "prefect-server.fullname" (index . 0) | trunc (sub 52 (len $suffix) | int)) "") $suffix -}}
{{- end -}}
