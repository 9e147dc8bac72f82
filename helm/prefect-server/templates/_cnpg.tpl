{{/* Rules, names and addresses of the database in mode cnpg, a Cluster of CloudNativePG with the plugin Barman Cloud. */}}

{{- define "prefect-server.validateCnpg" -}}
{{- with .Values.database.cnpg -}}
{{- if eq (include "prefect-server.databaseMode" $) "cnpg" -}}
{{- if not .archive.destination -}}
{{- fail "database.mode=cnpg needs database.cnpg.archive.destination: without an archive of WAL no point in time can be recovered. Set it to a folder for this release alone, as s3://BUCKET/FOLDER." -}}
{{- end -}}
{{- if not .image.tag -}}
{{- fail "database.cnpg.image.tag is empty: CloudNativePG reads the version of Postgres from it. Set the tag, and a digest as well if you want one." -}}
{{- end -}}
{{- if eq .image.tag "latest" -}}
{{- fail "database.cnpg.image.tag is `latest`: this tag changes under a running Cluster, and CloudNativePG refuses it. Set a tag that stays." -}}
{{- end -}}
{{- include "prefect-server.validateArchiveTimeout" (get .configuration "archive_timeout" | toString) -}}
{{- $name := include "prefect-server.cnpgName" $ -}}
{{- if eq .recovery.source $name -}}
{{- fail (printf "database.cnpg.recovery.source is %s, the name of the Cluster itself: a recovery makes a new Cluster, and the old one keeps its archive. Set database.cnpg.name to a new name." $name) -}}
{{- end -}}
{{- if and .recovery.targetTime (not .recovery.source) -}}
{{- fail "database.cnpg.recovery.targetTime is set without database.cnpg.recovery.source: the chart does not know whose archive to recover from. Set recovery.source to the name of the old Cluster." -}}
{{- end -}}
{{- if and .recovery.settled (ne .recovery.settled $name) -}}
{{- fail (printf "database.cnpg.recovery.settled is %s, and the Cluster is %s: the runs of another database are settled. Leave it empty, and set it to %s when the settling Job has ended." .recovery.settled $name $name) -}}
{{- end -}}
{{- include "prefect-server.validateResources" (list "database.cnpg.resources" .resources) -}}
{{- include "prefect-server.validateResources" (list "database.cnpg.archive.resources" .archive.resources) -}}
{{- if lookup "v1" "Namespace" "" $.Release.Namespace -}}
{{- include "prefect-server.validateCnpgCluster" $ -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `archive_timeout` in seconds or with a unit of Postgres. 0 turns it off. */}}
{{- define "prefect-server.validateArchiveTimeout" -}}
{{- $units := dict "" 1 "s" 1 "min" 60 -}}
{{- $unit := regexFind "[a-z]*$" . -}}
{{- $seconds := 0 -}}
{{- if and (regexMatch "^[0-9]+ *[a-z]*$" .) (hasKey $units $unit) -}}
{{- $seconds = mul (regexFind "^[0-9]+" . | int64) (get $units $unit) -}}
{{- end -}}
{{- if or (lt (int64 $seconds) 1) (gt (int64 $seconds) 300) -}}
{{- fail (printf "database.cnpg.configuration.archive_timeout is %q: the newest writes may be lost for as long, and 5 minutes are the most. Set it to 1 to 300 seconds, for example 4min." .) -}}
{{- end -}}
{{- end -}}

{{/* What the cluster has. Helm can look only with access to it. */}}
{{- define "prefect-server.validateCnpgCluster" -}}
{{- range $kind, $program := dict "postgresql.cnpg.io/v1/Cluster" "the operator CloudNativePG" "barmancloud.cnpg.io/v1/ObjectStore" "the plugin Barman Cloud of CloudNativePG" -}}
{{- if not ($.Capabilities.APIVersions.Has $kind) -}}
{{- fail (printf "database.mode=cnpg needs %s: the cluster does not know %s. Install it as docs/how-to/cloudnative-pg.md describes." $program $kind) -}}
{{- end -}}
{{- end -}}
{{- $bundled := include "prefect-server.statefulSet" (list . "database") -}}
{{- $found := lookup "apps/v1" "StatefulSet" .Release.Namespace $bundled -}}
{{- if gt (dig "spec" "replicas" 0 $found | int64) 0 -}}
{{- fail (printf "database.mode=cnpg would leave the data of the bundled database behind: StatefulSet %s runs in namespace %s, and the new Cluster is empty. Make a backup, and stop the StatefulSet, as docs/how-to/cloudnative-pg.md describes: kubectl --namespace %s scale statefulset %s --replicas=0" $bundled .Release.Namespace .Release.Namespace $bundled) -}}
{{- end -}}
{{- end -}}

{{/* Name of the Cluster: up to 50 characters. The operator's Services and Secrets begin with it. */}}
{{- define "prefect-server.cnpgName" -}}
{{- .Values.database.cnpg.name | default (printf "%s-db" (regexReplaceAll "-+$" (include "prefect-server.fullname" . | trunc 47) "")) -}}
{{- end -}}

{{- define "prefect-server.archiveName" -}}
{{- include "prefect-server.fullname" . -}}-archive
{{- end -}}

{{/* Annotations of what stays when the release is uninstalled, or names another Cluster: by Helm, and by Argo CD. */}}
{{- define "prefect-server.keep" -}}
helm.sh/resource-policy: keep
argocd.argoproj.io/sync-options: Prune=false,Delete=false
{{- end -}}

{{/* "true" while API and services must not start: the runs of a recovered database are not settled. */}}
{{- define "prefect-server.held" -}}
{{- $recovery := .Values.database.cnpg.recovery -}}
{{- if and (eq (include "prefect-server.databaseMode" .) "cnpg") $recovery.source (not $recovery.settled) -}}true{{- end -}}
{{- end -}}

{{/* How often and how long the Jobs of migrations are tried. A recovery may take hours, and they wait for its end. */}}
{{- define "prefect-server.migrationLimits" -}}
{{- $held := eq (include "prefect-server.held" .) "true" -}}
backoffLimit: {{ ternary 1000 (int64 .Values.migrations.backoffLimit) $held }}
activeDeadlineSeconds: {{ ternary 86400 (int64 .Values.migrations.activeDeadlineSeconds) $held }}
{{- end -}}

{{/* `spec.configuration` of the ObjectStore. */}}
{{- define "prefect-server.objectStore" -}}
{{- $archive := .Values.database.cnpg.archive -}}
{{- $configuration := dict "destinationPath" $archive.destination "wal" (dict "compression" "gzip") "data" (dict "compression" "gzip") -}}
{{- with $archive.endpoint -}}{{- $_ := set $configuration "endpointURL" . -}}{{- end -}}
{{- if $archive.existingSecret -}}
{{- $key := dict "name" $archive.existingSecret "key" "AWS_ACCESS_KEY_ID" -}}
{{- $_ := set $configuration "s3Credentials" (dict "accessKeyId" $key "secretAccessKey" (dict "name" $archive.existingSecret "key" "AWS_SECRET_ACCESS_KEY")) -}}
{{- else if hasPrefix "s3:" $archive.destination -}}
{{- $_ := set $configuration "s3Credentials" (dict "inheritFromIAMRole" true) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $configuration $archive.objectStore) -}}
{{- end -}}

{{/* `spec.bootstrap` of the Cluster. */}}
{{- define "prefect-server.bootstrap" -}}
{{- $recovery := .Values.database.cnpg.recovery -}}
{{- if $recovery.source -}}
recovery:
  source: {{ $recovery.source | quote }}
  database: prefect
  owner: prefect
  {{- with $recovery.targetTime }}
  recoveryTarget: {targetTime: {{ . | quote }}}
  {{- end }}
{{- else -}}
initdb:
  database: prefect
  owner: prefect
  dataChecksums: true
  postInitSQL:
    # For backups by `backup.enabled`, which verify a dump in a scratch database.
    - alter role prefect createdb
  postInitApplicationSQL:
    - create extension if not exists pg_trgm
{{- end -}}
{{- end -}}

{{/* Peers: the pods of the Cluster, and those of the Cluster that a recovery reads. */}}
{{- define "prefect-server.cnpgPeers" -}}
{{- range list (include "prefect-server.cnpgName" .) .Values.database.cnpg.recovery.source | compact }}
- podSelector: {matchLabels: {cnpg.io/cluster: {{ . | quote }}}}
{{- end -}}
{{- end -}}

{{/* Peer that is CloudNativePG's operator. */}}
{{- define "prefect-server.cnpgOperator" -}}
- namespaceSelector:
    matchLabels: {{- toYaml .Values.database.cnpg.operator.namespaceLabels | nindent 6 }}
  podSelector:
    matchLabels: {{- toYaml .Values.database.cnpg.operator.podLabels | nindent 6 }}
{{- end -}}
