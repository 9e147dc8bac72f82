{{/* Rules of pods. Kubernetes would check them too late, or without naming the key. */}}

{{/* Pod of a component: (dict "component" "pod" "volumes" "mounts" "containers" "resources" "grace"). `volumes`, `mounts` and
     `containers` are the names and paths that the chart uses. `grace` is the grace period in seconds, by default 30. */}}
{{- define "prefect-server.validatePod" -}}
{{- $path := printf "%s.pod" .component -}}
{{- $known := append .volumes "tmp" -}}
{{- range .pod.volumes -}}
{{- if has .name $.volumes -}}
{{- fail (printf "%s.volumes (or pod.volumes) has a volume %q: the chart uses this name for its own volume. Choose another name." $path .name) -}}
{{- end -}}
{{- $known = append $known .name -}}
{{- end -}}
{{- include "prefect-server.validateTwice" (list (printf "%s.volumes" $path) "name" .pod.volumes) -}}
{{- include "prefect-server.validateTwice" (list (printf "%s.volumeMounts" $path) "mountPath" .pod.volumeMounts) -}}
{{- range .pod.volumeMounts -}}
{{- if has .mountPath $.mounts -}}
{{- fail (printf "%s.volumeMounts (or pod.volumeMounts) has the mountPath %s: the chart mounts its own volume there. Choose another mountPath." $path .mountPath) -}}
{{- end -}}
{{- end -}}
{{- $containers := concat (.pod.initContainers | default list) (.pod.sidecars | default list) -}}
{{- range prepend $containers (dict "volumeMounts" .pod.volumeMounts) -}}
{{- range .volumeMounts -}}
{{- if not (has .name $known) -}}
{{- fail (printf "%s.volumeMounts (or a container's volumeMounts) names the volume %q: %s.volumes has only %s. Add the volume." $path .name $path ($known | uniq | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names := .containers -}}
{{- range $containers -}}
{{- if not .image -}}
{{- fail (printf "%s.initContainers or %s.sidecars (or pod's) has a container %q without an image: Kubernetes needs one. Add its image." $path $path .name) -}}
{{- end -}}
{{- if has .name $names -}}
{{- fail (printf "%s.initContainers or %s.sidecars (or pod's) has a container %q: another container of the pod has this name. Choose another name." $path $path .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range $key := list "initContainers" "sidecars" -}}
{{- range index $.pod $key -}}
{{- $of := printf "%s.%s: %s" $path $key .name -}}
{{- include "prefect-server.validateTwice" (list (printf "%s.volumeMounts" $of) "mountPath" .volumeMounts) -}}
{{- $ports := list -}}
{{- range .ports -}}
{{- if .name -}}{{- $ports = append $ports . -}}{{- end -}}
{{- end -}}
{{- include "prefect-server.validateTwice" (list (printf "%s.ports" $of) "name" $ports) -}}
{{- $grace := int64 ($.grace | default 30) -}}
{{- range $hook := .lifecycle -}}
{{- if gt (dig "sleep" "seconds" 0 $hook | int64) $grace -}}
{{- fail (printf "%s.lifecycle sleeps longer than the pod's grace period (%d seconds): Kubernetes refuses that. Shorten the sleep, or raise terminationGracePeriodSeconds." $of $grace) -}}
{{- end -}}
{{- end -}}
{{- include "prefect-server.validateReferences" (list (printf "%s.%s." $path $key) .env .envFrom) -}}
{{- include "prefect-server.validateResources" (list (printf "%s.resources" $of) (.resources | default dict)) -}}
{{- include "prefect-server.validateSecurity" (list (printf "%s.securityContext" $of) .securityContext) -}}
{{- end -}}
{{- end -}}
{{- include "prefect-server.validateSecurity" (list (printf "%s.containerSecurityContext" $path) .pod.containerSecurityContext) -}}
{{- include "prefect-server.validatePlacement" (list $path .pod) -}}
{{- include "prefect-server.validateResources" (list (printf "%s.resources" .component) .resources) -}}
{{- end -}}

{{/* Security context: (list path securityContext). */}}
{{- define "prefect-server.validateSecurity" -}}
{{- with index . 1 -}}
{{- if and .privileged (eq (toJson .allowPrivilegeEscalation) "false") -}}
{{- fail (printf "%s has privileged=true and allowPrivilegeEscalation=false: they exclude each other. Set allowPrivilegeEscalation=true, or privileged=false." (index $ 0)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Objects whose key must be unique in a list: (list path key list). */}}
{{- define "prefect-server.validateTwice" -}}
{{- $key := index . 1 -}}
{{- $found := list -}}
{{- range index . 2 -}}
{{- if has (get . $key) $found -}}
{{- fail (printf "%s (or pod's) has the %s %q twice: Kubernetes takes each only once. Remove one." (index $ 0) $key (get . $key | toString)) -}}
{{- end -}}
{{- $found = append $found (get . $key) -}}
{{- end -}}
{{- end -}}

{{/* Placement and DNS of a pod: (list path pod). */}}
{{- define "prefect-server.validatePlacement" -}}
{{- $path := index . 0 -}}
{{- $pod := index . 1 -}}
{{- $pairs := list -}}
{{- range $pod.topologySpreadConstraints -}}
{{- include "prefect-server.validateSelector" (list (printf "%s.topologySpreadConstraints" $path) .labelSelector) -}}
{{- $pairs = append $pairs (dict "pair" (printf "%s, %s" .topologyKey .whenUnsatisfiable)) -}}
{{- end -}}
{{- include "prefect-server.validateTwice" (list (printf "%s.topologySpreadConstraints" $path) "pair" $pairs) -}}
{{- include "prefect-server.validateSelected" (list (printf "%s.nodeSelector" $path) ($pod.nodeSelector | default dict)) -}}
{{- range $pod.tolerations -}}
{{- include "prefect-server.validateSelected" (list (printf "%s.tolerations" $path) (dict (.key | default "") (.value | default ""))) -}}
{{- end -}}
{{- if gt (len (join " " ($pod.dnsConfig | default dict).searches)) 2048 -}}
{{- fail (printf "%s.dnsConfig.searches are longer than 2048 characters together: Kubernetes refuses that. Remove some." $path) -}}
{{- end -}}
{{- if and (eq ($pod.dnsPolicy | default "") "None") (not ($pod.dnsConfig | default dict).nameservers) -}}
{{- fail (printf "%s.dnsPolicy=None needs %s.dnsConfig.nameservers: the pod could resolve no name. Set nameservers, or another dnsPolicy." $path $path) -}}
{{- end -}}
{{- end -}}

{{/* Quantity as a number. */}}
{{- define "prefect-server.quantity" -}}
{{- $text := include "prefect-server.text" . -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $units $unit) -}}
{{- end -}}

{{/* Requests and limits of a container: (list path resources). */}}
{{- define "prefect-server.validateResources" -}}
{{- $path := index . 0 -}}
{{- $requests := (index . 1).requests | default dict -}}
{{- $limits := (index . 1).limits | default dict -}}
{{- range $name, $value := $requests -}}
{{- $limit := get $limits $name -}}
{{- if and (kindIs "invalid" $value | not) (hasKey $limits $name) (kindIs "invalid" $limit | not) -}}
{{- if gt (include "prefect-server.quantity" $value | float64) (include "prefect-server.quantity" $limit | float64) -}}
{{- fail (printf "%s.requests.%s (%s) is above %s.limits.%s (%s): Kubernetes refuses that. Raise the limit, or lower the request." $path $name (include "prefect-server.text" $value) $path $name (include "prefect-server.text" $limit)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := concat (keys $requests) (keys $limits) | uniq | sortAlpha -}}
{{- if or (contains "/" $name) (hasPrefix "hugepages-" $name) -}}
{{- $limit := get $limits $name | default 0 -}}
{{- $request := get $requests $name | default $limit -}}
{{- if ne (include "prefect-server.quantity" $limit) (include "prefect-server.quantity" $request) -}}
{{- fail (printf "%s.limits.%s differs from %s.requests.%s: Kubernetes cannot overcommit this resource. Set only limits.%s." $path $name $path $name $name) -}}
{{- end -}}
{{- $page := 1.0 -}}
{{- if hasPrefix "hugepages-" $name -}}{{- $page = include "prefect-server.quantity" (trimPrefix "hugepages-" $name) | float64 -}}{{- end -}}
{{- $pages := divf (include "prefect-server.quantity" $limit | float64) $page -}}
{{- if ne (floor $pages) $pages -}}
{{- fail (printf "%s.limits.%s is %s: Kubernetes takes only whole units of this resource (of huge pages, whole pages). Set a whole number." $path $name (include "prefect-server.text" $limit)) -}}
{{- end -}}
{{- if and (hasPrefix "hugepages-" $name) (not (or $requests.cpu $requests.memory $limits.cpu $limits.memory)) -}}
{{- fail (printf "%s.limits.%s needs a request of cpu or memory: Kubernetes refuses huge pages alone. Set %s.requests.memory." $path $name $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
