{{/* Rules across values. A message is `<what failed>: <cause>. <cure>.` and names the key. values.schema.json has the rules of
     single values. */}}
{{- define "prefect-work-pool.validate" -}}
{{- include "prefect-work-pool.validateImages" . -}}
{{- include "prefect-work-pool.validateQueues" . -}}
{{- include "prefect-work-pool.validateNamespaces" . -}}
{{- include "prefect-work-pool.validateMove" . -}}
{{- include "prefect-work-pool.validateAccounts" . -}}
{{- include "prefect-work-pool.validateDeadline" . -}}
{{- include "prefect-work-pool.validateSidecars" . -}}
{{- include "prefect-work-pool.validateWarm" . -}}
{{- include "prefect-work-pool.validateScale" . -}}
{{- include "prefect-work-pool.validatePods" . -}}
{{- include "prefect-work-pool.validateFilled" . -}}
{{- include "prefect-work-pool.validateVariables" . -}}
{{- include "prefect-work-pool.validateResults" . -}}
{{- include "prefect-work-pool.validateTls" . -}}
{{- include "prefect-work-pool.validateSecret" . -}}
{{- end -}}

{{- define "prefect-work-pool.validateImages" -}}
{{- $values := .Values -}}
{{- if not (or $values.image.tag $values.image.digest) -}}
{{- fail "image.tag is empty: the chart has no image to run. Set image.tag to a tag that `make push` printed, or set image.digest. `make deploy` sets the tag." -}}
{{- end -}}
{{- range $image := list $values.image $values.runs.image -}}
{{- if eq ($image.tag | default "") "latest" -}}
{{- fail "image.tag (or runs.image.tag) is `latest`: this tag changes under a running release. Set a tag that stays, or a digest." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The pool and its queues. */}}
{{- define "prefect-work-pool.validateQueues" -}}
{{- $values := .Values -}}
{{- if hasPrefix "prefect" (lower $values.pool.name) -}}
{{- fail (printf "pool.name %q starts with `prefect`: the server reserves such names. Choose another name." $values.pool.name) -}}
{{- end -}}
{{- $queues := list "default" -}}
{{- include "prefect-work-pool.validateTwice" (list "pool.queues" "name" $values.pool.queues) -}}
{{- range $values.pool.queues -}}{{- $queues = append $queues .name -}}{{- end -}}
{{- range $values.worker.queues -}}
{{- if not (has . $queues) -}}
{{- fail (printf "worker.queues names %q: pool.queues has only %s. Add the queue to pool.queues, or remove it from worker.queues." . (join ", " $queues)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Namespaces of runs. Helm can check that they exist only with access to the cluster. */}}
{{- define "prefect-work-pool.validateNamespaces" -}}
{{- range $name := include "prefect-work-pool.runsNamespaces" . | fromYamlArray -}}
{{- if not (regexMatch "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$" $name) -}}
{{- fail (printf "runs.namespace or runs.formerNamespaces names %q: a namespace has up to 63 lower-case letters, digits and -. Choose another name, or correct its template." $name) -}}
{{- end -}}
{{- if and (lookup "v1" "Namespace" "" $.Release.Namespace) (not (lookup "v1" "Namespace" "" $name)) -}}
{{- fail (printf "runs.namespace or runs.formerNamespaces names %s: the cluster has no such namespace. Create it: kubectl create namespace %s" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Runs in progress keep network policy and reconciler when their namespace changes. Helm can check only with access to the
     cluster. */}}
{{- define "prefect-work-pool.validateMove" -}}
{{- $worker := lookup "apps/v1" "Deployment" .Release.Namespace (printf "%s-worker" (include "prefect-work-pool.fullname" .)) -}}
{{- $args := (dig "spec" "template" "spec" "containers" list $worker | first | default dict).args | default list -}}
{{- range $index, $argument := $args -}}
{{- if and (eq $argument "--namespace") (lt (add1 $index | int) (len $args)) -}}
{{- $name := index $args (add1 $index) | replace "$(NAMESPACE)" $.Release.Namespace -}}
{{- if not (has $name (include "prefect-work-pool.runsNamespaces" $ | fromYamlArray)) -}}
{{- fail (printf "runs.namespace is %s, and the installed worker starts runs in %s: runs in progress there would be left alone. Add %s to runs.formerNamespaces, and remove it when no run is in progress there." (include "prefect-work-pool.runsNamespace" $) $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Service accounts whose Roles the chart creates. */}}
{{- define "prefect-work-pool.validateAccounts" -}}
{{- $values := .Values -}}
{{- if and (not $values.worker.serviceAccount.create) (not $values.worker.serviceAccount.name) -}}
{{- fail "worker.serviceAccount.create=false needs worker.serviceAccount.name: the default account would get permission to create Jobs. Name an existing account." -}}
{{- end -}}
{{- if and $values.reconciler.enabled (not $values.reconciler.serviceAccount.create) (not $values.reconciler.serviceAccount.name) -}}
{{- fail "reconciler.serviceAccount.create=false needs reconciler.serviceAccount.name: the default account would get permission to delete Jobs. Name an existing account." -}}
{{- end -}}
{{- if not (or $values.runs.serviceAccount.create $values.runs.serviceAccount.name) -}}
{{- fail "runs.serviceAccount.create=false needs runs.serviceAccount.name: the account `default` may have permissions of other pods. Name an existing account." -}}
{{- end -}}
{{- end -}}

{{- define "prefect-work-pool.validateDeadline" -}}
{{- $values := .Values -}}
{{- $prefetch := int $values.worker.prefetchSeconds -}}
{{- with $values.runs.activeDeadlineSeconds -}}
{{- if le (int .) $prefetch -}}
{{- fail "runs.activeDeadlineSeconds is not above worker.prefetchSeconds: a run that is submitted early would be killed before its scheduled time. Raise runs.activeDeadlineSeconds." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Sidecars, which keep a pod from ending. */}}
{{- define "prefect-work-pool.validateSidecars" -}}
{{- $values := .Values -}}
{{- if and $values.runs.pod.sidecars (not (and $values.reconciler.enabled (int64 $values.reconciler.replicas))) -}}
{{- fail "runs.pod.sidecars needs the reconciler: it deletes a run's Job when the main container has ended. Set reconciler.enabled=true and reconciler.replicas above 0, or put the containers into runs.pod.initContainers with restartPolicy: Always." -}}
{{- end -}}
{{- range $component := list "sync" "tests" -}}
{{- if (index $values $component).pod.sidecars -}}
{{- fail (printf "%s.pod.sidecars is set: a sidecar would keep the pod from ending. Put the containers into %s.pod.initContainers with restartPolicy: Always." $component $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "prefect-work-pool.validateWarm" -}}
{{- $runs := .Values.runs -}}
{{- if $runs.warm.replicas -}}
{{- if not (and .Values.reconciler.enabled (int64 .Values.reconciler.replicas)) -}}
{{- fail "runs.warm.replicas needs the reconciler: a run in a warm pod would not be retried. Set reconciler.enabled=true and reconciler.replicas above 0." -}}
{{- end -}}
{{- if not $runs.entrypoint -}}
{{- fail "runs.warm.replicas needs runs.entrypoint: the supervisor waits for the run. Set runs.entrypoint to its default." -}}
{{- end -}}
{{- if int64 $runs.backoffLimit -}}
{{- fail "runs.warm.replicas needs runs.backoffLimit=0: a further pod of the Job would wait for a run in vain. Set runs.backoffLimit=0." -}}
{{- end -}}
{{- if $runs.activeDeadlineSeconds -}}
{{- fail "runs.warm.replicas needs runs.activeDeadlineSeconds=null: the time in which a pod waits would count. Set active_deadline_seconds in the deployments, whose runs then take no warm pod." -}}
{{- end -}}
{{- if $runs.pod.sidecars -}}
{{- fail "runs.warm.replicas and runs.pod.sidecars are set: a sidecar would keep a warm pod from ending. Put the containers into runs.pod.initContainers with restartPolicy: Always." -}}
{{- end -}}
{{- if not .Values.admissionPolicy.enabled -}}
{{- fail "runs.warm.replicas needs admissionPolicy.enabled=true: the worker may patch pods, and only the policy restricts that to labels of warm pods. Set admissionPolicy.enabled=true." -}}
{{- end -}}
{{- $kind := "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy" -}}
{{- if not (.Capabilities.APIVersions.Has $kind) -}}
{{- fail (printf "runs.warm.replicas needs Kubernetes 1.30: the API has no ValidatingAdmissionPolicy, which restricts the worker to labels of warm pods. Set runs.warm.replicas=0, or call `helm template` with --api-versions %s." $kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Replicas, updates and disruption budgets. */}}
{{- define "prefect-work-pool.validateScale" -}}
{{- if and .Values.worker.autoscaling.enabled (not (dig "requests" "cpu" "" .Values.worker.resources)) -}}
{{- fail "worker.autoscaling.enabled=true needs worker.resources.requests.cpu: CPU use is measured against the request. Set the request, or worker.autoscaling.enabled=false." -}}
{{- end -}}
{{- with .Values.worker.autoscaling -}}
{{- if and .enabled (gt (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- fail "worker.autoscaling.minReplicas is above worker.autoscaling.maxReplicas: no number of pods meets both. Raise maxReplicas." -}}
{{- end -}}
{{- end -}}
{{- $component := "worker" -}}
{{- $grace := int64 (index $.Values $component).terminationGracePeriodSeconds -}}
{{- $sleep := dig "preStop" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if and $sleep (ge $sleep $grace) -}}
{{- fail (printf "%s.lifecycle.preStop.sleep.seconds (%d) is not below %s.terminationGracePeriodSeconds (%d): no time is left for the shutdown after the sleep. Raise terminationGracePeriodSeconds, or set lifecycle.preStop to null." $component $sleep $component $grace) -}}
{{- end -}}
{{- $sleep = dig "postStart" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if gt $sleep $grace -}}
{{- fail (printf "%s.lifecycle.postStart.sleep.seconds (%d) is above %s.terminationGracePeriodSeconds (%d): Kubernetes refuses a longer sleep. Raise terminationGracePeriodSeconds, or shorten the sleep." $component $sleep $component $grace) -}}
{{- end -}}
{{- with .Values.worker.strategy -}}
{{- if and (eq .type "RollingUpdate") (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxSurge" | toString)) (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxUnavailable" | toString)) -}}
{{- fail "worker.strategy.rollingUpdate has 0 for maxSurge and for maxUnavailable: no pod could ever be replaced. Set one of them to 1." -}}
{{- end -}}
{{- end -}}
{{- range $component := list "worker" "reconciler" -}}
{{- with (index $.Values $component).podDisruptionBudget -}}
{{- if and .enabled (eq (toString .minAvailable) "") (eq (toString .maxUnavailable) "") -}}
{{- fail (printf "%s.podDisruptionBudget has neither minAvailable nor maxUnavailable: a budget needs one of them. Set one, or enabled=false." $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values after their templates are rendered. */}}
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
{{- $ca := ternary (dict "volumes" (list "api-ca") "mounts" (list "/etc/prefect-api/ca")) (dict "volumes" list "mounts" list) (ne .Values.api.tls.caSecret "") -}}
{{- range $component, $own := dict "worker" dict "runs" (dict "main" "prefect-job") "sync" (dict "volumes" (list "pool") "mounts" (list "/etc/prefect-pool")) "drift" dict "reconciler" dict -}}
{{- $pod := include "prefect-work-pool.podValues" (list $ $component) | fromYaml -}}
{{- $volumes := concat ($own.volumes | default list) $ca.volumes -}}
{{- $mounts := concat ($own.mounts | default list) $ca.mounts -}}
{{- if and (eq $component "runs") (eq $.Values.runs.results.storage "volume") -}}
{{- $volumes = append $volumes "results" -}}
{{- $mounts = append $mounts "/results" -}}
{{- end -}}
{{- if and (eq $component "runs") $.Values.runs.warm.replicas -}}
{{- $volumes = append $volumes "hand-over" -}}
{{- $mounts = append $mounts "/etc/prefect-run" -}}
{{- end -}}
{{- if and (eq $component "worker") (include "prefect-work-pool.signingSecret" $) -}}
{{- $volumes = append $volumes "signing-key" -}}
{{- $mounts = append $mounts "/etc/prefect-results" -}}
{{- end -}}
{{- if eq $component "sync" -}}{{- $pod = omit $pod "sidecars" -}}{{- end -}}
{{- include "prefect-work-pool.validatePod" (dict "component" $component "pod" $pod "volumes" $volumes "mounts" $mounts "containers" (list ($own.main | default $component)) "resources" (index $.Values $component).resources "grace" (index $.Values $component).terminationGracePeriodSeconds) -}}
{{- end -}}
{{- $pod := omit (include "prefect-work-pool.podValues" (list . "tests") | fromYaml) "sidecars" -}}
{{- include "prefect-work-pool.validatePod" (dict "component" "tests" "pod" $pod "volumes" $ca.volumes "mounts" $ca.mounts "containers" (list "test") "resources" dict) -}}
{{- end -}}

{{/* Job variables in the values of runs. Prefect would silently drop a {{ }} that names no job variable. */}}
{{- define "prefect-work-pool.validateVariables" -}}
{{- $variables := (include "prefect-work-pool.jobVariables" . | fromYaml).properties -}}
{{- $variables = merge dict $variables (dig "variables" "properties" dict .Values.runs.baseJobTemplate) -}}
{{- $pod := include "prefect-work-pool.podValues" (list . "runs") | fromYaml -}}
{{- range $path, $value := dict "runs.annotations" .Values.runs.annotations "runs.labels" .Values.runs.labels "runs.env" .Values.runs.env "runs.envFrom" .Values.runs.envFrom "runs.settings" .Values.runs.settings "runs.entrypoint" .Values.runs.entrypoint "runs.pod" $pod "commonLabels" .Values.commonLabels "commonAnnotations" .Values.commonAnnotations "runs.baseJobTemplate" .Values.runs.baseJobTemplate -}}
{{- range regexFindAll "\\{\\{\\s*[\\w.\\-\\[\\]$]+\\s*\\}\\}" (include "prefect-work-pool.filled" (list $ $path $value) | replace "\n" " ") -1 -}}
{{- $name := trimAll "{} \t" . -}}
{{- if not (hasKey $variables $name) -}}
{{- fail (printf "%s (or pod's) has %s: Prefect reads it as a job variable, and the pool has none of that name. Add it to runs.variables, or remove the text from the runs' pods." $path .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "prefect-work-pool.validateResults" -}}
{{- $runs := .Values.runs -}}
{{- with $runs.results -}}
{{- if and (eq .storage "s3") (not .s3.bucket) -}}
{{- fail "runs.results.storage=s3 needs runs.results.s3.bucket: results have no place. Set the name of an existing bucket." -}}
{{- end -}}
{{- if and (eq .storage "redis") (not .redis.existingSecret) -}}
{{- fail "runs.results.storage=redis needs runs.results.redis.existingSecret: results have no place. Name a Secret that has the URL of a Redis or Valkey under runs.results.redis.key." -}}
{{- end -}}
{{- range $name := list "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK" "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK" -}}
{{- if and (ne $runs.results.storage "none") (hasKey $runs.settings $name) -}}
{{- fail (printf "runs.settings.%s is another storage than runs.results.storage=%s: runs have one default storage. Remove the setting, or set runs.results.storage=none." $name $runs.results.storage) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := list "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" "RESULTS_REDIS_URL" -}}
{{- if hasKey $runs.settings $name -}}
{{- fail (printf "runs.settings.%s is a secret: it would be in plain text in the pool's template. Put it into a Secret, and refer to the Secret in runs.env: {name: %s, valueFrom: {secretKeyRef: ...}}" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Existing Secrets and their keys. Pods cannot start without them. Helm can check only with access to the cluster. A Secret
     of runs is in their namespace. */}}
{{- define "prefect-work-pool.validateSecret" -}}
{{- $root := . -}}
{{- $own := .Release.Namespace -}}
{{- $ofRuns := include "prefect-work-pool.runsNamespace" . -}}
{{- $references := list -}}
{{- with .Values.api.auth -}}
{{- if include "prefect-work-pool.rolesSecret" $root -}}
{{- range $key := list "worker" "reconciler" "sync" "run-key" -}}
{{- $references = append $references (dict "path" "api.auth.rolesSecret" "namespace" $own "name" $root.Values.api.auth.rolesSecret "key" $key "cure" "Copy the Secret from the namespace of the server (docs/how-to/api-roles.md). For a server without auth.roles.enabled set api.auth.rolesSecret to an empty string.") -}}
{{- end -}}
{{- else if .existingSecret -}}
{{- range $namespace := uniq (list $own $ofRuns) -}}
{{- $references = append $references (dict "path" "api.auth.existingSecret" "namespace" $namespace "name" $root.Values.api.auth.existingSecret "key" $root.Values.api.auth.key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.api.tls -}}
{{- if .caSecret -}}
{{- range $namespace := uniq (list $own $ofRuns) -}}
{{- $references = append $references (dict "path" "api.tls.caSecret" "namespace" $namespace "name" $root.Values.api.tls.caSecret "key" $root.Values.api.tls.caKey "cure" (printf "Create it with the CA's certificate: kubectl --namespace %s create secret generic %s --from-file=%s" $namespace $root.Values.api.tls.caSecret $root.Values.api.tls.caKey)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.runs.results -}}
{{- if eq .storage "redis" -}}
{{- $references = append $references (dict "path" "runs.results.redis.existingSecret" "namespace" $ofRuns "name" .redis.existingSecret "key" .redis.key) -}}
{{- end -}}
{{- if and .signing.enabled .signing.existingSecret -}}
{{- $references = append $references (dict "path" "runs.results.signing.existingSecret" "namespace" $own "name" .signing.existingSecret "key" .signing.key) -}}
{{- end -}}
{{- end -}}
{{- range $path, $env := dict "env" .Values.env "worker.env" .Values.worker.env "runs.env" .Values.runs.env "sync.env" .Values.sync.env "drift.env" (ternary .Values.drift.env list .Values.drift.enabled) "reconciler.env" (ternary .Values.reconciler.env list .Values.reconciler.enabled) -}}
{{- range $variable := $env -}}
{{- $reference := dig "valueFrom" "secretKeyRef" dict $variable -}}
{{- if and $reference (not $reference.optional) -}}
{{- $name := tpl $reference.name $root -}}
{{- if not (contains "{{" $name) }}{{/* otherwise a job variable names the Secret of each run */}}
{{- $references = append $references (dict "path" (printf "%s: %s" $path $variable.name) "namespace" (ternary $ofRuns $own (eq $path "runs.env")) "name" $name "key" $reference.key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if lookup "v1" "Namespace" "" .Release.Namespace -}}
{{- range $references -}}
{{- $secret := lookup "v1" "Secret" .namespace .name -}}
{{- if not $secret -}}
{{- fail (printf "%s names the Secret %s: namespace %s has no such Secret. %s" .path .name .namespace (.cure | default (printf "Create it: kubectl --namespace %s create secret generic %s --from-literal=%s=..." .namespace .name .key))) -}}
{{- end -}}
{{- if not (hasKey ($secret.data | default dict) .key) -}}
{{- fail (printf "%s names the key %s: Secret %s in namespace %s does not have it. Add the key, or choose one of: %s." .path .key .name .namespace (keys ($secret.data | default dict) | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
