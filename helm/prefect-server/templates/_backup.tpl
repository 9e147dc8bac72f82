{{/* Rules, names and arguments of the component backup. */}}

{{- define "prefect-server.validateBackup" -}}
{{- with .Values.backup -}}
{{- if and .enabled (eq .storage "s3") (not .s3.bucket) -}}
{{- fail "backup.storage=s3 needs backup.s3.bucket: there is no place for backups. Set backup.s3.bucket, or backup.storage=volume." -}}
{{- end -}}
{{- if and .image.repository (not (or .image.tag .image.digest)) -}}
{{- fail "backup.image.repository is set without backup.image.tag: the image has no version. Set backup.image.tag or backup.image.digest, or leave repository empty." -}}
{{- end -}}
{{- if eq .image.tag "latest" -}}
{{- fail "backup.image.tag is `latest`: this tag changes under a running release. Set a tag that stays, or backup.image.digest." -}}
{{- end -}}
{{- if and .alert.enabled (not .enabled) -}}
{{- fail "backup.alert.enabled=true needs backup.enabled=true: without backups the alert would never stop. Set backup.enabled=true, or backup.alert.enabled=false." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Name of the CronJob, whose Jobs have a name with 11 more characters. */}}
{{- define "prefect-server.backupName" -}}
{{- include "prefect-server.statefulSet" (list . "backup") -}}
{{- end -}}

{{/* Image with pg_dump: the backup's own, else that of the bundled database. */}}
{{- define "prefect-server.backupImage" -}}
{{- include "prefect-server.image" (ternary .Values.backup.image .Values.database.bundled.image (ne .Values.backup.image.repository "")) -}}
{{- end -}}

{{- define "prefect-server.backupClaim" -}}
{{- .Values.backup.volume.existingClaim | default (printf "%s-backups" (include "prefect-server.fullname" .)) -}}
{{- end -}}

{{/* Arguments of the container that stores the dump. */}}
{{- define "prefect-server.backupArgs" -}}
{{- $s3 := .Values.backup.s3 -}}
- python
- -m
- orchestration.recovery
- store
{{- if eq .Values.backup.storage "s3" }}
- --to=s3://{{ $s3.bucket }}/{{ $s3.prefix | default (printf "%s/%s" .Release.Namespace .Release.Name) }}
{{- with $s3.endpoint }}
- --endpoint={{ . }}
{{- end }}
{{- with $s3.region }}
- --region={{ . }}
{{- end }}
{{- else }}
- --to=file:///backups
{{- end }}
- --keep-last={{ int64 .Values.backup.keep.last }}
- --keep-days={{ int64 .Values.backup.keep.days }}
{{- range .Values.backup.encryption.recipients }}
- --recipient={{ . }}
{{- end }}
{{- end -}}

{{/* Variables with the address of the database, as libpq and the script `backup` take them. */}}
{{- define "prefect-server.libpqEnv" -}}
{{- if eq (include "prefect-server.databaseMode" .) "external" }}
- name: CONNECTION_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.database.external.existingSecret | quote }}, key: {{ .Values.database.external.key | quote }}}}
{{- else }}
- {name: PGHOST, value: {{ include "prefect-server.databaseHost" . }}}
- name: PGUSER
  {{- include "prefect-server.databaseUser" . | nindent 2 }}
- {name: PGDATABASE, value: prefect}
- name: PGPASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "prefect-server.databaseSecret" . | quote }}, key: password}}
{{- end }}
{{- include "prefect-server.databaseTlsEnv" . }}
# libpq looks for its files there.
- {name: HOME, value: /work}
{{- end -}}
