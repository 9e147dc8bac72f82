{{/* Rules across values. A message is `<what failed>: <cause>. <cure>.` and names the key. values.schema.json has the rules of
     single values. */}}
{{- define "prefect-server.validate" -}}
{{- include "prefect-server.validateImage" . -}}
{{- include "prefect-server.validateDatabase" . -}}
{{- include "prefect-server.validateCnpg" . -}}
{{- include "prefect-server.validateProcesses" . -}}
{{- include "prefect-server.validateRoles" . -}}
{{- include "prefect-server.validateOidc" . -}}
{{- include "prefect-server.validateRoutes" . -}}
{{- include "prefect-server.validateNames" . -}}
{{- include "prefect-server.validateAccount" . -}}
{{- include "prefect-server.validateScale" . -}}
{{- include "prefect-server.validateTls" . -}}
{{- include "prefect-server.validatePgbouncer" . -}}
{{- include "prefect-server.validateConnections" . -}}
{{- include "prefect-server.validatePods" . -}}
{{- include "prefect-server.validateFilled" . -}}
{{- include "prefect-server.validateService" . -}}
{{- include "prefect-server.validateSecrets" . -}}
{{- include "prefect-server.validateBackup" . -}}
{{- include "prefect-server.validateAlert" . -}}
{{- include "prefect-server.validateRetention" . -}}
{{- end -}}

{{- define "prefect-server.validateImage" -}}
{{- $values := .Values -}}
{{- if not (or $values.image.tag $values.image.digest) -}}
{{- fail "image.tag is empty: the chart has no image to run. Set image.tag to a tag that `make push` printed, or set image.digest. `make deploy` sets the tag." -}}
{{- end -}}
{{- if eq $values.image.tag "latest" -}}
{{- fail "image.tag is `latest`: this tag changes under a running release. Set a tag that stays, or image.digest." -}}
{{- end -}}
{{- end -}}

{{/* The database and Redis of the server. */}}
{{- define "prefect-server.validateDatabase" -}}
{{- $values := .Values -}}
{{- $mode := $values.database.mode -}}
{{- if and $mode (ne $mode "external") $values.database.external.existingSecret -}}
{{- fail (printf "database.mode=%s and database.external.existingSecret are both set: a server has one database. Set mode=external, or leave existingSecret empty." $mode) -}}
{{- end -}}
{{- if and (eq $mode "external") (not $values.database.external.existingSecret) -}}
{{- fail "database.mode=external needs database.external.existingSecret: the server has no address of a database. Set it to a Secret with the database's URL." -}}
{{- end -}}
{{- if and (eq $mode "bundled") (not $values.database.bundled.enabled) -}}
{{- fail "database.mode=bundled and database.bundled.enabled=false contradict each other: the server has no database. Set bundled.enabled=true, or another mode." -}}
{{- end -}}
{{- if and (not $mode) $values.database.external.existingSecret $values.database.bundled.enabled -}}
{{- fail "database.external.existingSecret and database.bundled.enabled are both set: a server has one database. Set database.bundled.enabled=false to use the external one, or leave existingSecret empty." -}}
{{- end -}}
{{- if not (or $mode $values.database.external.existingSecret $values.database.bundled.enabled) -}}
{{- fail "No database is configured: database.bundled.enabled is false and database.external.existingSecret is empty. Set existingSecret to a Secret with the database's URL, or database.bundled.enabled=true." -}}
{{- end -}}
{{- if and $values.redis.external.existingSecret $values.redis.bundled.enabled -}}
{{- fail "redis.external.existingSecret and redis.bundled.enabled are both set: a server has one Redis. Set redis.bundled.enabled=false to use the external one, or leave existingSecret empty." -}}
{{- end -}}
{{- end -}}

{{/* Processes that need a shared Redis, or may run only once. */}}
{{- define "prefect-server.validateProcesses" -}}
{{- $values := .Values -}}
{{- $redis := include "prefect-server.redis" . -}}
{{- if and $values.services.separate (not $redis) -}}
{{- fail "services.separate=true needs a Redis: events would stay in the API's memory. Set redis.bundled.enabled=true or redis.external.existingSecret, or services.separate=false." -}}
{{- end -}}
{{- $replicas := ternary $values.api.autoscaling.maxReplicas $values.api.replicas $values.api.autoscaling.enabled -}}
{{- if and (gt (int $replicas) 1) (not $redis) -}}
{{- fail "api.replicas (or api.autoscaling.maxReplicas) over 1 needs a Redis: runs would be scheduled twice. Set redis.bundled.enabled=true or redis.external.existingSecret." -}}
{{- end -}}
{{- if and (gt (int $replicas) 1) (not $values.services.separate) -}}
{{- fail "api.replicas (or api.autoscaling.maxReplicas) over 1 needs services.separate=true: each API pod would run all services. Set services.separate=true, or one replica." -}}
{{- end -}}
{{- end -}}

{{/* `lookup` finds no namespace where Helm has no cluster, as in `helm template` and Argo CD. */}}
{{- define "prefect-server.validateRoles" -}}
{{- with .Values.auth -}}
{{- if and (include "prefect-server.roles" $) .existingSecret (not .roles.existingSecret) (not (lookup "v1" "Namespace" "" $.Release.Namespace)) -}}
{{- fail "auth.existingSecret is set, auth.roles.existingSecret is empty, and Helm finds no namespace in a cluster: the credentials of the roles would change at each rendering. Set auth.roles.existingSecret, or auth.roles.enabled=false. If Helm installs into a cluster, create the namespace first." -}}
{{- end -}}
{{- end -}}
{{- if and (include "prefect-server.roles" .) .Values.api.args -}}
{{- fail "auth.roles.enabled=true and api.args are both set: api.args replaces the command that checks the roles. Use api.extraArgs, or set auth.roles.enabled=false." -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.validateRoutes" -}}
{{- $values := .Values -}}
{{- $parents := dict -}}
{{- range $parent := ternary $values.httpRoute.parentRefs list $values.httpRoute.enabled -}}
{{- $name := list $parent.group $parent.kind $parent.namespace $parent.name | toJson -}}
{{- $section := $parent.sectionName | default "" -}}
{{- $others := get $parents $name | default list -}}
{{- if and $others (or (not $section) (has $section $others) (has "" $others)) -}}
{{- fail (printf "httpRoute.parentRefs names a gateway twice: %s. Give each entry a different sectionName, or remove one." $parent.name) -}}
{{- end -}}
{{- $_ := set $parents $name (append $others $section) -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.enabled=true needs ingress.hosts: an Ingress without hosts routes nothing. Set ingress.hosts=[{host: prefect.example.com, paths: [{path: /, pathType: Prefix}]}]." -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled=true needs httpRoute.parentRefs: a route without a gateway receives nothing. Set httpRoute.parentRefs=[{name: GATEWAY, namespace: NAMESPACE}]." -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.validateNames" -}}
{{- if regexMatch "^[0-9]" (include "prefect-server.fullname" .) -}}
{{- fail (printf "fullnameOverride (or the release's name) makes the name %q, which begins with a digit: Kubernetes refuses a Service of such a name. Set fullnameOverride to a name that begins with a letter." (include "prefect-server.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.validateAccount" -}}
{{- with .Values.serviceAccount -}}
{{- if not (or .create .name) -}}
{{- fail "serviceAccount.create=false needs serviceAccount.name: the account `default` may have permissions of other pods. Name an existing account." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Replicas, updates and disruption budgets. */}}
{{- define "prefect-server.validateScale" -}}
{{- if and .Values.api.autoscaling.enabled (not (dig "requests" "cpu" "" .Values.api.resources)) -}}
{{- fail "api.autoscaling.enabled=true needs api.resources.requests.cpu: CPU use is measured against the request. Set the request, or api.autoscaling.enabled=false." -}}
{{- end -}}
{{- with .Values.api.autoscaling -}}
{{- if and .enabled (gt (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- fail "api.autoscaling.minReplicas is above api.autoscaling.maxReplicas: no number of pods meets both. Raise maxReplicas." -}}
{{- end -}}
{{- end -}}
{{- range $component := list "api" "services" -}}
{{- $grace := int64 (index $.Values $component).terminationGracePeriodSeconds -}}
{{- $sleep := dig "preStop" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if and $sleep (ge $sleep $grace) -}}
{{- fail (printf "%s.lifecycle.preStop.sleep.seconds (%d) is not below %s.terminationGracePeriodSeconds (%d): no time is left for the shutdown after the sleep. Raise terminationGracePeriodSeconds, or set lifecycle.preStop to null." $component $sleep $component $grace) -}}
{{- end -}}
{{- $sleep = dig "postStart" "sleep" "seconds" 0 (index $.Values $component).lifecycle | int64 -}}
{{- if gt $sleep $grace -}}
{{- fail (printf "%s.lifecycle.postStart.sleep.seconds (%d) is above %s.terminationGracePeriodSeconds (%d): Kubernetes refuses a longer sleep. Raise terminationGracePeriodSeconds, or shorten the sleep." $component $sleep $component $grace) -}}
{{- end -}}
{{- with (index $.Values $component).strategy -}}
{{- if and (eq .type "RollingUpdate") (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxSurge" | toString)) (regexMatch "^0%?$" (get (.rollingUpdate | default dict) "maxUnavailable" | toString)) -}}
{{- fail (printf "%s.strategy.rollingUpdate has 0 for maxSurge and for maxUnavailable: no pod could ever be replaced. Set one of them to 1." $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $component := list "api" "services" "pgbouncer" "oidc" -}}
{{- with (index $.Values $component).podDisruptionBudget -}}
{{- if and .enabled (eq (toString .minAvailable) "") (eq (toString .maxUnavailable) "") -}}
{{- fail (printf "%s.podDisruptionBudget has neither minAvailable nor maxUnavailable: a budget needs one of them. Set one, or enabled=false." $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.validateService" -}}
{{- $service := .Values.service -}}
{{- $ports := prepend $service.extraPorts (dict "name" "http" "port" $service.port "nodePort" $service.nodePort) -}}
{{- include "prefect-server.validateTwice" (list "service.extraPorts" "name" $ports) -}}
{{- include "prefect-server.validateTwice" (list "service.extraPorts" "port" $ports) -}}
{{- $ofNodes := list -}}
{{- range $ports -}}
{{- if .nodePort -}}{{- $ofNodes = append $ofNodes . -}}{{- end -}}
{{- end -}}
{{- include "prefect-server.validateTwice" (list "service.extraPorts" "nodePort" $ofNodes) -}}
{{- with $service.ipFamilies -}}
{{- $family := ternary "IPv6" "IPv4" (contains ":" $service.clusterIP) -}}
{{- if and (regexMatch "[.:]" $service.clusterIP) (ne (first .) $family) -}}
{{- fail (printf "service.clusterIP is an address of %s: the first of service.ipFamilies is %s. Make the two agree." $family (first .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values after their templates are rendered. */}}
{{- define "prefect-server.validateFilled" -}}
{{- range $prefix, $values := dict "" .Values "api." .Values.api "services." .Values.services "migrations." .Values.migrations "backup." .Values.backup "oidc." .Values.oidc -}}
{{- $filled := include "prefect-server.filled" (list $ (printf "%senv" $prefix) (dict "env" $values.env "envFrom" $values.envFrom)) | fromYaml -}}
{{- include "prefect-server.validateReferences" (list $prefix $filled.env $filled.envFrom) -}}
{{- end -}}
{{- $filled := include "prefect-server.filled" (list . "values" (dict "policy" (pick .Values.networkPolicy "apiFrom" "metricsFrom" "extraEgress") "ingress" (pick .Values.ingress "hosts" "tls") "route" (pick .Values.httpRoute "parentRefs" "hostnames") "direct" .Values.oidc.directHosts)) | fromYaml -}}
{{- include "prefect-server.validatePeers" (list "networkPolicy.apiFrom" $filled.policy.apiFrom) -}}
{{- include "prefect-server.validatePeers" (list "networkPolicy.metricsFrom" $filled.policy.metricsFrom) -}}
{{- include "prefect-server.validateEgress" (list "networkPolicy.extraEgress" $filled.policy.extraEgress) -}}
{{- range $filled.ingress.hosts -}}{{- include "prefect-server.validateName" (list "ingress.hosts" .host) -}}{{- end -}}
{{- range $filled.ingress.tls -}}
{{- range .hosts -}}{{- include "prefect-server.validateName" (list "ingress.tls" .) -}}{{- end -}}
{{- with .secretName -}}{{- include "prefect-server.validateName" (list "ingress.tls" .) -}}{{- end -}}
{{- end -}}
{{- range $filled.route.hostnames -}}{{- include "prefect-server.validateName" (list "httpRoute.hostnames" .) -}}{{- end -}}
{{- range $filled.direct -}}{{- include "prefect-server.validateName" (list "oidc.directHosts" .) -}}{{- end -}}
{{- range $filled.route.parentRefs -}}
{{- range $name := list .name .sectionName -}}
{{- with $name -}}{{- include "prefect-server.validateName" (list "httpRoute.parentRefs" .) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- include "prefect-server.validateTimeouts" .Values.httpRoute.timeouts -}}
{{- end -}}

{{- define "prefect-server.validateTimeouts" -}}
{{- $seconds := list -}}
{{- range $time := list .request .backendRequest -}}
{{- $sum := 0.0 -}}
{{- range regexFindAll "[0-9]+(ms|h|m|s)" $time -1 -}}
{{- $unit := regexFind "[a-z]+" . -}}
{{- $sum = addf $sum (mulf (trimSuffix $unit . | float64) (get (dict "h" 3600.0 "m" 60.0 "s" 1.0 "ms" 0.001) $unit)) -}}
{{- end -}}
{{- $seconds = append $seconds $sum -}}
{{- end -}}
{{- if and (index $seconds 0) (gt (index $seconds 1) (index $seconds 0)) -}}
{{- fail (printf "httpRoute.timeouts.backendRequest (%s) is longer than httpRoute.timeouts.request (%s): the Gateway API refuses that. Lower backendRequest." .backendRequest .request) -}}
{{- end -}}
{{- end -}}

{{/* The alerts of the services need metrics that Prometheus can read: without them one of the alerts would never stop. */}}
{{- define "prefect-server.validateAlert" -}}
{{- if .Values.services.alert.enabled -}}
{{- $component := ternary "services" "api" .Values.services.separate -}}
{{- if (index .Values $component).args -}}
{{- fail (printf "services.alert.enabled=true and %s.args contradict each other: your command need not serve the metrics. Leave %s.args empty, or set services.alert.enabled=false." $component $component) -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.metricsFrom) -}}
{{- fail "services.alert.enabled=true needs networkPolicy.metricsFrom: the NetworkPolicy would keep Prometheus from the metrics. Set it to the peers of Prometheus." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "prefect-server.validatePods" -}}
{{- $tls := ternary (dict "volumes" (list "tls") "mounts" (list "/etc/prefect-tls")) (dict "volumes" list "mounts" list) .Values.tls.enabled -}}
{{- if include "prefect-server.cnpgCa" . -}}
{{- $tls = dict "volumes" (list "tls" "database-ca" "replaced-ca") "mounts" (list "/etc/prefect-tls" "/etc/prefect-database-ca" "/etc/prefect-replaced-ca") -}}
{{- end -}}
{{- range $component := list "migrations" "tests" "backup" -}}
{{- if (index $.Values $component).pod.sidecars -}}
{{- fail (printf "%s.pod.sidecars is set: a sidecar would keep the pod from ending. Put the containers into %s.pod.initContainers with restartPolicy: Always." $component $component) -}}
{{- end -}}
{{- end -}}
{{- range $component := list "api" "services" "pgbouncer" "oidc" "migrations" "tests" "backup" -}}
{{- $pod := include "prefect-server.podValues" (list $ $component) | fromYaml -}}
{{- if has $component (list "migrations" "tests" "backup") -}}{{- $pod = omit $pod "sidecars" -}}{{- end -}}
{{- $volumes := get (dict "backup" (list "work" "scripts" "backups") "pgbouncer" (list "connection" "configuration" "server-ca")) $component | default list | concat $tls.volumes -}}
{{- $mounts := ternary (list "/run/pgbouncer" "/etc/pgbouncer" "/etc/pgbouncer-ca") list (eq $component "pgbouncer") | concat $tls.mounts -}}
{{- include "prefect-server.validatePod" (dict "component" $component "pod" $pod "volumes" $volumes "mounts" $mounts "containers" (list $component "test" "wait-for-migrations" "dump" "store" "connection") "resources" ((index $.Values $component).resources | default dict) "grace" (ternary 60 (index $.Values $component).terminationGracePeriodSeconds (eq $component "pgbouncer"))) -}}
{{- end -}}
{{- range $component, $own := dict "database" (dict "volumes" (list "data" "run" "init") "mounts" (list "/var/lib/postgresql/data" "/var/run/postgresql" "/docker-entrypoint-initdb.d") "main" "postgres" "grace" 120) "redis" (dict "main" "valkey") -}}
{{- $pod := include "prefect-server.bundledPod" (list $ $component) | fromYaml -}}
{{- include "prefect-server.validatePod" (dict "component" (printf "%s.bundled" $component) "pod" $pod "volumes" ($own.volumes | default list | concat $tls.volumes) "mounts" ($own.mounts | default list | concat $tls.mounts) "containers" (list $own.main) "resources" (index $.Values $component).bundled.resources "grace" $own.grace) -}}
{{- end -}}
{{- end -}}

{{/* Existing Secrets and their keys. Pods cannot start without them. Helm can check only with access to the cluster. */}}
{{- define "prefect-server.validateSecrets" -}}
{{- $root := . -}}
{{- $mode := include "prefect-server.databaseMode" . -}}
{{- /* CloudNativePG's operator makes this Secret after the first deploy. */ -}}
{{- $made := ternary (printf "%s-ca" (include "prefect-server.cnpgName" .)) "" (eq $mode "cnpg") -}}
{{- $references := list
  (dict "path" "auth.existingSecret" "name" .Values.auth.existingSecret "key" .Values.auth.key)
  (dict "path" "auth.roles.existingSecret" "name" (ternary .Values.auth.roles.existingSecret "" .Values.oidc.enabled) "key" "oidc-key")
  (dict "path" "oidc.existingSecret" "name" (ternary .Values.oidc.existingSecret "" .Values.oidc.enabled) "key" "client-secret")
  (dict "path" "oidc.existingSecret" "name" (ternary .Values.oidc.existingSecret "" .Values.oidc.enabled) "key" "cookie-secret")
  (dict "path" "encryptionKey.existingSecret" "name" .Values.encryptionKey.existingSecret "key" .Values.encryptionKey.key)
  (dict "path" "database.external.existingSecret" "name" .Values.database.external.existingSecret "key" .Values.database.external.key)
  (dict "path" "database.bundled.existingSecret" "name" (ternary .Values.database.bundled.existingSecret "" (eq $mode "bundled")) "key" "password")
  (dict "path" "database.cnpg.archive.existingSecret" "name" (ternary .Values.database.cnpg.archive.existingSecret "" (eq $mode "cnpg")) "key" "AWS_ACCESS_KEY_ID")
  (dict "path" "pgbouncer.serverTLS.caSecret" "name" (ternary .Values.pgbouncer.serverTLS.caSecret "" (and .Values.pgbouncer.enabled (ne .Values.pgbouncer.serverTLS.caSecret $made))) "key" .Values.pgbouncer.serverTLS.caKey)
  (dict "path" "tls.existingSecret" "name" .Values.tls.existingSecret "key" "ca.crt")
  (dict "path" "tls.existingSecret" "name" .Values.tls.existingSecret "key" "tls.crt")
  (dict "path" "tls.existingSecret" "name" .Values.tls.existingSecret "key" "tls.key")
  (dict "path" "redis.external.existingSecret" "name" .Values.redis.external.existingSecret "key" .Values.redis.external.key)
  (dict "path" "redis.bundled.existingSecret" "name" .Values.redis.bundled.existingSecret "key" "password")
  (dict "path" "backup.s3.existingSecret" "name" (ternary .Values.backup.s3.existingSecret "" .Values.backup.enabled) "key" "AWS_ACCESS_KEY_ID") -}}
{{- if lookup "v1" "Namespace" "" .Release.Namespace -}}
{{- range $references -}}
{{- if .name -}}
{{- $secret := lookup "v1" "Secret" $root.Release.Namespace .name -}}
{{- if not $secret -}}
{{- fail (printf "%s names the Secret %s: namespace %s has no such Secret. Create it: kubectl --namespace %s create secret generic %s --from-literal=%s=..." .path .name $root.Release.Namespace $root.Release.Namespace .name .key) -}}
{{- end -}}
{{- if not (hasKey ($secret.data | default dict) .key) -}}
{{- fail (printf "%s names the key %s: Secret %s in namespace %s does not have it. Add the key, or choose one of: %s." .path .key .name $root.Release.Namespace (keys ($secret.data | default dict) | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Prefect's vacuum of runs would delete the newest Completed run of a deployment, too. */}}
{{- define "prefect-server.validateRetention" -}}
{{- $name := "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED" -}}
{{- range $path, $settings := dict "settings" .Values.settings "api.settings" .Values.api.settings "services.settings" .Values.services.settings -}}
{{- $value := include "prefect-server.text" (index $settings $name) -}}
{{- if and (int64 $.Values.retention.days.runs) (regexMatch "flow_runs|(?i)^(true|1)$" $value) -}}
{{- fail (printf "%s.%s and retention.days.runs both delete runs: Prefect's vacuum deletes the newest Completed run of a deployment, too. Remove the setting." $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
