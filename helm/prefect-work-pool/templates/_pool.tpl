{{/* Owner that `sync` records on the server, by which a later sync recognises its resources. */}}
{{- define "prefect-work-pool.owner" -}}
{{- .Values.sync.owner | default (printf "%s of %s in %s" .Values.pool.name .Release.Name .Release.Namespace) -}}
{{- end -}}

{{/* Name of the release's storage block, by which runs find their results. */}}
{{- define "prefect-work-pool.resultsBlock" -}}
{{- printf "%s-%s-results" .Release.Namespace (include "prefect-work-pool.fullname" .) | replace "." "-" -}}
{{- end -}}

{{/* The pool and the storage of its results, as a file for `orchestrate sync`. */}}
{{- define "prefect-work-pool.pool" -}}
work_pools:
  - name: {{ .Values.pool.name | quote }}
    type: kubernetes
    description: {{ .Values.pool.description | quote }}
    concurrency_limit: {{ toJson .Values.pool.concurrencyLimit }}
    queues:
      {{- range .Values.pool.queues }}
      - name: {{ .name | quote }}
        {{- with .priority }}
        priority: {{ int64 . }}
        {{- end }}
        concurrency_limit: {{ .concurrencyLimit | toJson }}
        description: {{ .description | default "" | quote }}
      {{- else }} []
      {{- end }}
    base_job_template:
      {{- include "prefect-work-pool.baseJobTemplate" . | nindent 6 }}
{{- with .Values.runs.results }}
{{- if has .storage (list "s3" "redis") }}
remote_file_systems:
  - name: {{ include "prefect-work-pool.resultsBlock" $ }}
    {{- if eq .storage "s3" }}
    {{- $client := dict }}
    {{- with .s3.endpoint }}{{- $_ := set $client "endpoint_url" . }}{{- end }}
    {{- with .s3.region }}{{- $_ := set $client "region_name" . }}{{- end }}
    basepath: {{ printf "s3://%s/%s" .s3.bucket (.s3.prefix | default (printf "%s/%s" $.Release.Namespace $.Release.Name)) | quote }}
    settings: {{ dict "client_kwargs" $client | toJson }}
    {{- else }}
    basepath: redis://{{ $.Release.Namespace }}/{{ $.Release.Name }}/results
    settings: {ttl: {{ mul (int64 .keepDays) 86400 }}}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Base job template as JSON: on the server for the UI and for deployments, in a ConfigMap for the worker. */}}
{{- define "prefect-work-pool.baseJobTemplate" -}}
{{- $template := dict "job_configuration" (include "prefect-work-pool.jobConfiguration" . | fromYaml) "variables" (include "prefect-work-pool.jobVariables" . | fromYaml) }}
{{- mergeOverwrite $template (deepCopy .Values.runs.baseJobTemplate) | toPrettyJson -}}
{{- end -}}

{{/* `job_configuration`: the Job of a run. Prefect replaces text in {{ }} by job variables. */}}
{{- define "prefect-work-pool.jobConfiguration" -}}
{{- $pod := include "prefect-work-pool.podValues" (list . "runs") | fromYaml -}}
name: "{{ "{{ name }}" }}"
command: "{{ "{{ command }}" }}"
env: "{{ "{{ env }}" }}"
labels: "{{ "{{ labels }}" }}"
annotations: "{{ "{{ annotations }}" }}"
namespace: {{ include "prefect-work-pool.runsNamespace" . }}
job_manifest:
  apiVersion: batch/v1
  kind: Job
  metadata:
    generateName: "{{ "{{ name }}" }}-"
    namespace: {{ include "prefect-work-pool.runsNamespace" . }}
    labels: "{{ "{{ labels }}" }}"
    annotations: "{{ "{{ annotations }}" }}"
  spec:
    backoffLimit: "{{ "{{ backoff_limit }}" }}"
    # The Job then records a disruption, which outlasts the pod when its node is lost.
    podFailurePolicy:
      rules:
        - {action: FailJob, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    ttlSecondsAfterFinished: "{{ "{{ finished_job_ttl }}" }}"
    activeDeadlineSeconds: "{{ "{{ active_deadline_seconds }}" }}"
    template:
      metadata:
        labels:
          {{- include "prefect-work-pool.runLabels" (list . $pod) | nindent 10 }}
        {{- $annotations := include "prefect-work-pool.filled" (list . "runs.annotations" .Values.runs.annotations) | fromYaml }}
        {{- with mergeOverwrite (include "prefect-work-pool.filled" (list . "commonAnnotations" .Values.commonAnnotations) | fromYaml) ($pod.annotations | default dict) $annotations }}
        annotations:
          {{- toYaml . | nindent 10 }}
        {{- end }}
      spec:
        {{- include "prefect-work-pool.runSpec" (list . $pod) | nindent 8 }}
{{- end -}}

{{/* `spec` of a run's pod: (list root pod). */}}
{{- define "prefect-work-pool.runSpec" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
{{- $volumes := include "prefect-work-pool.caVolumes" $root | fromYamlArray -}}
{{- $mounts := include "prefect-work-pool.caMounts" $root | fromYamlArray -}}
{{- if eq $root.Values.runs.results.storage "volume" -}}
{{- $volumes = append $volumes (dict "name" "results" "persistentVolumeClaim" (dict "claimName" (include "prefect-work-pool.resultsClaim" $root))) -}}
{{- $mounts = append $mounts (dict "name" "results" "mountPath" "/results") -}}
{{- end -}}
parallelism: 1
completions: 1
restartPolicy: Never
serviceAccountName: "{{ "{{ service_account_name }}" }}"
automountServiceAccountToken: {{ $root.Values.runs.serviceAccount.automountToken }}
terminationGracePeriodSeconds: {{ int64 $root.Values.runs.terminationGracePeriodSeconds }}
{{ include "prefect-work-pool.placement" . }}
{{- with $pod.initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: prefect-job
    image: "{{ "{{ image }}" }}"
    imagePullPolicy: "{{ "{{ image_pull_policy }}" }}"
    {{- with $root.Values.runs.entrypoint }}
    command: {{- toYaml . | nindent 6 }}
    {{- end }}
    args: "{{ "{{ command }}" }}"
    {{- include "prefect-work-pool.containerEnv" (list $root "runs") | nindent 4 }}
    resources: {{- include "prefect-work-pool.runResources" $root.Values.runs.resources | nindent 6 }}
    securityContext: {{- toYaml $pod.containerSecurityContext | nindent 6 }}
    volumeMounts:
      {{- include "prefect-work-pool.mounts" (list $mounts $pod) | nindent 6 }}
  {{- with $pod.sidecars }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  {{- include "prefect-work-pool.volumes" (list $volumes $pod) | nindent 2 }}
{{- end -}}

{{/* Resources of a run. CPU and memory are job variables. Others, such as GPUs, are the same for all runs. */}}
{{- define "prefect-work-pool.runResources" -}}
{{- $resources := dict -}}
{{- range $part, $variable := dict "requests" "request" "limits" "limit" -}}
{{- $others := include "prefect-work-pool.quantities" (omit (index $ $part | default dict) "cpu" "memory") | fromYaml -}}
{{- $own := dict "cpu" (printf "{{ cpu_%s }}" $variable) "memory" (printf "{{ memory_%s }}" $variable) -}}
{{- $_ := set $resources $part (merge $own $others) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Labels of runs: (list root pod). Policies and quotas select runs by the chart's labels. The worker adds Prefect's labels. */}}
{{- define "prefect-work-pool.runLabels" -}}
{{- $root := index . 0 -}}
{{- $own := dict "app.kubernetes.io/instance" $root.Release.Name "app.kubernetes.io/component" "runs" "prefect.io/role" "flow-run" -}}
{{- $labels := mergeOverwrite dict ((index . 1).labels | default dict) (include "prefect-work-pool.filled" (list $root "runs.labels" $root.Values.runs.labels) | fromYaml) -}}
{{- include "prefect-work-pool.mergedLabels" (list $root $own "runs.labels" $labels) -}}
{{- end -}}

{{/* The job variable `image`. runs.allowed.images restricts it by a pattern, which the image of runs always meets. */}}
{{- define "prefect-work-pool.imageVariable" -}}
{{- $image := dict "title" "Image" "type" "string" "default" (include "prefect-work-pool.runsImage" .) "description" "The container's image." -}}
{{- with .Values.runs.allowed.images -}}
{{- $own := regexReplaceAll "[:@][^/]*$" (include "prefect-work-pool.runsImage" $) "" -}}
{{- $patterns := list (printf "%s[:@].*" (regexQuoteMeta $own)) -}}
{{- range . -}}{{- $patterns = append $patterns (regexQuoteMeta . | replace "\\*" ".*") -}}{{- end -}}
{{- $_ := set $image "pattern" (printf "^(%s)$" (join "|" $patterns)) -}}
{{- end -}}
{{- toYaml $image -}}
{{- end -}}

{{/* `variables`: what a deployment or a run may set, with the release's defaults. They are upstream's variables, except those
     that do nothing in prefect-kubernetes 0.8 (job_watch_timeout_seconds, pod_watch_timeout_seconds, stream_output), and
     except namespace and cluster_config: the Role covers only the namespace of runs. */}}
{{- define "prefect-work-pool.jobVariables" -}}
{{- $runs := .Values.runs -}}
{{- $requests := include "prefect-work-pool.quantities" $runs.resources.requests | fromYaml -}}
{{- $limits := include "prefect-work-pool.quantities" $runs.resources.limits | fromYaml -}}
{{- $text := list (dict "type" "string") (dict "type" "null") -}}
{{- $number := list (dict "type" "integer") (dict "type" "null") -}}
{{- $map := dict "type" "string" -}}
{{- /* Policies, quotas and the reconciler identify pods by the reserved keys. Prefect makes such a key of `_prefect.io/role`
       and of `job--name`, so a key has to be one that Prefect takes as it is. */ -}}
{{- $key := "^(?!.*--)([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$(?!\\n)" -}}
{{- $reserved := "^(app\\.kubernetes\\.io/|prefect\\.io/|reconciler\\.|kubectl\\.kubernetes\\.io/|batch\\.kubernetes\\.io/|job-name$|controller-uid$)" -}}
{{- $free := dict "pattern" $key "not" (dict "pattern" $reserved) -}}
{{- $accounts := prepend .Values.runs.allowed.serviceAccounts (include "prefect-work-pool.serviceAccountName" (list . "runs")) -}}
{{- $variables := dict
  "name" (dict "title" "Name" "anyOf" $text "default" nil "description" "Prefix of the Job's name.")
  "command" (dict "title" "Command" "anyOf" $text "default" nil "description" "Command of the container. Empty: run the flow.")
  "env" (dict "title" "Environment Variables" "type" "object" "additionalProperties" (dict "anyOf" $text) "propertyNames" (dict "not" (dict "enum" (list "RESULTS_SIGNING_KEY" "RESULTS_FORMER_SIGNING_KEYS"))) "description" "Environment variables in plain text. Secrets come from runs.env of the chart.")
  "labels" (dict "title" "Labels" "type" "object" "additionalProperties" $map "propertyNames" $free "description" "Labels of the Job and its pod.")
  "annotations" (dict "title" "Annotations" "type" "object" "additionalProperties" $map "propertyNames" $free "description" "Annotations of the Job and its pod.")
  "image" (include "prefect-work-pool.imageVariable" . | fromYaml)
  "image_pull_policy" (dict "title" "Image Pull Policy" "type" "string" "enum" (list "IfNotPresent" "Always" "Never") "default" ($runs.image.pullPolicy | default .Values.image.pullPolicy) "description" "When the node pulls the image.")
  "service_account_name" (dict "title" "Service Account Name" "type" "string" "enum" $accounts "default" (first $accounts) "description" "The pod's service account.")
  "backoff_limit" (dict "title" "Backoff Limit" "type" "integer" "minimum" 0 "default" (int $runs.backoffLimit) "description" "How often Kubernetes retries a failed pod. At 0, Prefect reschedules a run whose pod is evicted.")
  "crash_retries" (dict "title" "Crash Retries" "type" "integer" "minimum" 0 "default" (int $runs.retries.crashes) "description" "Retries after crashes.")
  "disruption_retries" (dict "title" "Disruption Retries" "type" "integer" "minimum" 0 "default" (int $runs.retries.disruptions) "description" "Retries after disruptions: eviction, drain, preemption, a lost node.")
  "crash_backoff" (dict "title" "Crash Backoff" "type" "number" "minimum" 0 "default" $runs.retries.backoffSeconds "description" "Seconds before the second retry after a crash, doubled for each further one. The first retry comes at once.")
  "memory_growth" (dict "title" "Memory Growth" "type" "number" "minimum" 1 "default" $runs.retries.memoryGrowth "description" "Factor by which the memory limit grows after an OOM kill.")
  "memory_max" (dict "title" "Memory Max" "anyOf" $text "default" ($runs.retries.memoryMax | default nil) "description" "The highest memory limit after growth.")
  "finished_job_ttl" (dict "title" "Finished Job TTL" "anyOf" $number "default" (int $runs.ttlSecondsAfterFinished) "description" "Seconds after which Kubernetes deletes a finished Job and its pod.")
  "active_deadline_seconds" (dict "title" "Active Deadline Seconds" "anyOf" $number "default" (ternary nil (int $runs.activeDeadlineSeconds) (kindIs "invalid" $runs.activeDeadlineSeconds)) "description" "Seconds that a run may take in all.")
  "cpu_request" (dict "title" "CPU Request" "anyOf" $text "default" (get $requests "cpu" | default nil) "description" "CPU that is reserved for the pod: 500m, 2.")
  "cpu_limit" (dict "title" "CPU Limit" "anyOf" $text "default" (get $limits "cpu" | default nil) "description" "CPU that the pod may use.")
  "memory_request" (dict "title" "Memory Request" "anyOf" $text "default" (get $requests "memory" | default nil) "description" "Memory that is reserved for the pod: 512Mi, 2Gi.")
  "memory_limit" (dict "title" "Memory Limit" "anyOf" $text "default" (get $limits "memory" | default nil) "description" "Memory above which the pod is killed: 1Gi, 4Gi.")
-}}
{{- dict "type" "object" "description" (printf "Job variables of the pool %s." .Values.pool.name) "properties" (mergeOverwrite $variables (deepCopy $runs.variables)) | toYaml -}}
{{- end -}}
