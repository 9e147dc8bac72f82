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
{{- include "prefect-work-pool.validateTwice" (list "pool.queues" "name" $values.pool.queues) -}}
{{- range $values.pool.queues -}}{{- $queues = append $queues .name -}}{{- end -}}
{{- range $values.worker.queues -}}
{{- if not (has . $queues) -}}
{{- fail (printf "worker.queues names %q, which pool.queues does not have: %s" . (join ", " $queues)) -}}
{{- end -}}
{{- end -}}
{{- if and $values.runs.pod.sidecars (not (and $values.reconciler.enabled (int64 $values.reconciler.replicas))) -}}
{{- fail "runs.pod.sidecars needs the reconciler, which deletes a run's Job when its main container has ended. Set reconciler.enabled=true and reconciler.replicas above 0, or put them into runs.pod.initContainers with restartPolicy: Always" -}}
{{- end -}}
{{- if and $values.worker.autoscaling.enabled (not (dig "requests" "cpu" "" $values.worker.resources)) -}}
{{- fail "worker.autoscaling.enabled=true needs worker.resources.requests.cpu: the utilisation is measured against it" -}}
{{- end -}}
{{- if and (not $values.worker.serviceAccount.create) (not $values.worker.serviceAccount.name) -}}
{{- fail "worker.serviceAccount.create=false needs worker.serviceAccount.name: the default account would get the right to make Jobs" -}}
{{- end -}}
{{- if and $values.reconciler.enabled (not $values.reconciler.serviceAccount.create) (not $values.reconciler.serviceAccount.name) -}}
{{- fail "reconciler.serviceAccount.create=false needs reconciler.serviceAccount.name: the default account would get the right to delete Jobs" -}}
{{- end -}}
{{- $prefetch := int $values.worker.prefetchSeconds -}}
{{- with $values.runs.activeDeadlineSeconds -}}
{{- if le (int .) $prefetch -}}
{{- fail "runs.activeDeadlineSeconds is not above worker.prefetchSeconds: a run that is submitted early would be ended before its time. Set it higher" -}}
{{- end -}}
{{- end -}}
{{- range $component := list "sync" "tests" -}}
{{- if (index $values $component).pod.sidecars -}}
{{- fail (printf "%s.pod.sidecars would keep its pod from ending. Put them into %s.pod.initContainers with restartPolicy: Always" $component $component) -}}
{{- end -}}
{{- end -}}
{{- include "prefect-work-pool.validateScale" . -}}
{{- include "prefect-work-pool.validatePods" . -}}
{{- include "prefect-work-pool.validateFilled" . -}}
{{- include "prefect-work-pool.validateVariables" . -}}
{{- include "prefect-work-pool.validateResults" . -}}
{{- include "prefect-work-pool.validateSecret" . -}}
{{- end -}}

{{- define "prefect-work-pool.validateScale" -}}
{{- with .Values.worker.autoscaling -}}
{{- if and .enabled (gt (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- fail "worker.autoscaling.minReplicas is above worker.autoscaling.maxReplicas. Raise maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- $component := "worker" -}}
{{- $grace := int64 (index $.Values $component).terminationGracePeriodSeconds -}}
{{- $sleep := dig "preStop" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if and $sleep (ge $sleep $grace) -}}
{{- fail (printf "%s.lifecycle.preStop.sleep.seconds (%d) is not below %s.terminationGracePeriodSeconds (%d). Raise terminationGracePeriodSeconds, or set lifecycle.preStop to null" $component $sleep $component $grace) -}}
{{- end -}}
{{- $sleep = dig "postStart" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if gt $sleep $grace -}}
{{- fail (printf "%s.lifecycle.postStart.sleep.seconds (%d) is above %s.terminationGracePeriodSeconds (%d). Raise terminationGracePeriodSeconds, or lower it" $component $sleep $component $grace) -}}
{{- end -}}
{{- with .Values.worker.strategy -}}
{{- if and (eq .type "RollingUpdate") (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxSurge" | toString)) (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxUnavailable" | toString)) -}}
{{- fail "worker.strategy.rollingUpdate has 0 for maxSurge and for maxUnavailable: no pod could ever be replaced. Set one of them to 1" -}}
{{- end -}}
{{- end -}}
{{- range $component := list "worker" "reconciler" -}}
{{- with (index $.Values $component).podDisruptionBudget -}}
{{- if and .enabled (eq (toString .minAvailable) "") (eq (toString .maxUnavailable) "") -}}
{{- fail (printf "%s.podDisruptionBudget has neither minAvailable nor maxUnavailable. Set one of them" $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What is filled from templates, where it is used. */}}
{{- define "prefect-work-pool.validateFilled" -}}
{{- range $prefix, $values := dict "" .Values "worker." .Values.worker "runs." .Values.runs "sync." .Values.sync "drift." .Values.drift "reconciler." .Values.reconciler -}}
{{- $filled := include "prefect-work-pool.filled" (list $ (printf "%senv" $prefix) (dict "env" $values.env "envFrom" $values.envFrom)) | fromYaml -}}
{{- include "prefect-work-pool.validateReferences" (list $prefix $filled.env $filled.envFrom) -}}
{{- end -}}
{{- $policy := include "prefect-work-pool.filled" (list . "networkPolicy" (pick .Values.networkPolicy "metricsFrom" "extraEgress")) | fromYaml -}}
{{- include "prefect-work-pool.validatePeers" (list "networkPolicy.metricsFrom" $policy.metricsFrom) -}}
{{- include "prefect-work-pool.validateEgress" (list "networkPolicy.extraEgress" $policy.extraEgress) -}}
{{- end -}}

{{- define "prefect-work-pool.validatePods" -}}
{{- range $component, $own := dict "worker" dict "runs" (dict "main" "prefect-job") "sync" (dict "volumes" (list "pool") "mounts" (list "/etc/prefect-pool")) "drift" dict "reconciler" dict -}}
{{- $pod := include "prefect-work-pool.podValues" (list $ $component) | fromYaml -}}
{{- $volumes := $own.volumes | default list -}}
{{- $mounts := $own.mounts | default list -}}
{{- if and (eq $component "runs") (eq $.Values.runs.results.storage "volume") -}}
{{- $volumes = list "results" -}}
{{- $mounts = list "/results" -}}
{{- end -}}
{{- if eq $component "sync" -}}{{- $pod = omit $pod "sidecars" -}}{{- end -}}
{{- include "prefect-work-pool.validatePod" (dict "component" $component "pod" $pod "volumes" $volumes "mounts" $mounts "containers" (list ($own.main | default $component)) "resources" (index $.Values $component).resources "grace" (index $.Values $component).terminationGracePeriodSeconds) -}}
{{- end -}}
{{- $pod := omit (include "prefect-work-pool.podValues" (list . "tests") | fromYaml) "sidecars" -}}
{{- include "prefect-work-pool.validatePod" (dict "component" "tests" "pod" $pod "volumes" list "mounts" list "containers" (list "test") "resources" dict) -}}
{{- end -}}

{{/* What is in {{ }} in the runs' values comes from job variables; Prefect would leave out what has another name. */}}
{{- define "prefect-work-pool.validateVariables" -}}
{{- $variables := (include "prefect-work-pool.jobVariables" . | fromYaml).properties -}}
{{- $variables = merge dict $variables (dig "variables" "properties" dict .Values.runs.baseJobTemplate) -}}
{{- $pod := include "prefect-work-pool.podValues" (list . "runs") | fromYaml -}}
{{- range $path, $value := dict "runs.annotations" .Values.runs.annotations "runs.labels" .Values.runs.labels "runs.env" .Values.runs.env "runs.envFrom" .Values.runs.envFrom "runs.settings" .Values.runs.settings "runs.entrypoint" .Values.runs.entrypoint "runs.pod" $pod "commonLabels" .Values.commonLabels "commonAnnotations" .Values.commonAnnotations "runs.baseJobTemplate" .Values.runs.baseJobTemplate -}}
{{- range regexFindAll "\\{\\{\\s*[\\w.\\-\\[\\]$]+\\s*\\}\\}" (include "prefect-work-pool.filled" (list $ $path $value) | replace "\n" " ") -1 -}}
{{- $name := trimAll "{} \t" . -}}
{{- if not (hasKey $variables $name) -}}
{{- fail (printf "%s (or pod's) has %s, which Prefect takes for a job variable that the pool does not have. Add it to runs.variables, or keep the text out of the runs' pods" $path .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "prefect-work-pool.validateResults" -}}
{{- $runs := .Values.runs -}}
{{- with $runs.results -}}
{{- if and (eq .storage "s3") (not .s3.bucket) -}}
{{- fail "runs.results.storage=s3 needs runs.results.s3.bucket: the name of a bucket that is there" -}}
{{- end -}}
{{- if and (eq .storage "redis") (not .redis.existingSecret) -}}
{{- fail "runs.results.storage=redis needs runs.results.redis.existingSecret: a Secret with the URL of a Redis or Valkey under runs.results.redis.key" -}}
{{- end -}}
{{- range $name := list "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK" "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK" -}}
{{- if and (ne $runs.results.storage "none") (hasKey $runs.settings $name) -}}
{{- fail (printf "runs.settings.%s is another storage than runs.results.storage=%s. Remove it, or set storage: none" $name $runs.results.storage) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := list "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" "RESULTS_REDIS_URL" -}}
{{- if hasKey $runs.settings $name -}}
{{- fail (printf "runs.settings.%s would be in plain text in the pool's template. Put it into a Secret, and its key into runs.env: {name: %s, valueFrom: {secretKeyRef: ...}}" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A Secret that is missing keeps pods from starting; where the cluster can be asked, that is said before. */}}
{{- define "prefect-work-pool.validateSecret" -}}
{{- $root := . -}}
{{- $references := list -}}
{{- with .Values.api.auth -}}
{{- if .existingSecret -}}
{{- $references = append $references (dict "path" "api.auth.existingSecret" "name" .existingSecret "key" .key) -}}
{{- end -}}
{{- end -}}
{{- with .Values.runs.results -}}
{{- if eq .storage "redis" -}}
{{- $references = append $references (dict "path" "runs.results.redis.existingSecret" "name" .redis.existingSecret "key" .redis.key) -}}
{{- end -}}
{{- end -}}
{{- range $path, $env := dict "env" .Values.env "worker.env" .Values.worker.env "runs.env" .Values.runs.env "sync.env" .Values.sync.env "drift.env" (ternary .Values.drift.env list .Values.drift.enabled) "reconciler.env" (ternary .Values.reconciler.env list .Values.reconciler.enabled) -}}
{{- range $variable := $env -}}
{{- $reference := dig "valueFrom" "secretKeyRef" dict $variable -}}
{{- if and $reference (not $reference.optional) -}}
{{- $name := tpl $reference.name $root -}}
{{- if not (contains "{{" $name) }}{{/* else it is a job variable, which each run has its own of */}}
{{- $references = append $references (dict "path" (printf "%s: %s" $path $variable.name) "name" $name "key" $reference.key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if lookup "v1" "Namespace" "" .Release.Namespace -}}
{{- range $references -}}
{{- $secret := lookup "v1" "Secret" $root.Release.Namespace .name -}}
{{- if not $secret -}}
{{- fail (printf "%s names a Secret %s that namespace %s does not have. Create it: kubectl --namespace %s create secret generic %s --from-literal=%s=..." .path .name $root.Release.Namespace $root.Release.Namespace .name .key) -}}
{{- end -}}
{{- if not (hasKey ($secret.data | default dict) .key) -}}
{{- fail (printf "%s asks for the key %s, which Secret %s in namespace %s does not have. It has: %s" .path .key .name $root.Release.Namespace (keys ($secret.data | default dict) | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
