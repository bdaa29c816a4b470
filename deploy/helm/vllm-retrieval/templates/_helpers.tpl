{{- define "vllm-retrieval.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "vllm-retrieval.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "vllm-retrieval.labels" -}}
{{ include "vllm-retrieval.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* GiB of the pod: host memory is 10^9 bytes, a limit is 2^30. */}}
{{- define "vllm-retrieval.memoryGi" -}}
{{- $host := divf (mulf .Values.retrieval.hostMemoryGb 1000000000) 1073741824 | ceil | int -}}
{{- $needed := add $host .Values.resources.overheadGi .Values.resources.shmGi -}}
{{- if and .Values.resources.memoryGi (lt (int .Values.resources.memoryGi) (int $needed)) -}}
{{- fail (printf "resources.memoryGi=%d can not hold retrieval.hostMemoryGb=%v: %d GiB are needed (host memory %d, overheadGi %d, shmGi %d)" (int .Values.resources.memoryGi) .Values.retrieval.hostMemoryGb (int $needed) $host (int .Values.resources.overheadGi) (int .Values.resources.shmGi)) -}}
{{- end -}}
{{- .Values.resources.memoryGi | default $needed -}}
{{- end -}}

{{- define "vllm-retrieval.knobs" -}}
{{- if hasKey .Values.retrieval.knobs "host_memory_gb" -}}
{{- fail "set retrieval.hostMemoryGb, from which the pod's memory follows, not retrieval.knobs.host_memory_gb" -}}
{{- end -}}
{{- $ours := dict "host_memory_gb" .Values.retrieval.hostMemoryGb -}}
{{- if .Values.ray.cluster -}}
{{- $ours = merge $ours (dict "ray_address" "auto" "threads" (int .Values.ray.cpus)) -}}
{{- end -}}
{{- dict "retrieval" (merge $ours .Values.retrieval.knobs) | toJson -}}
{{- end -}}

{{- define "vllm-retrieval.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository .Values.image.tag -}}
{{- end -}}
{{- end -}}

{{/* Both containers of a pod with KubeRay's Ray talk to it by this token. */}}
{{- define "vllm-retrieval.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.ray.tokenSecret }}, key: key}}
{{- end -}}

{{- define "vllm-retrieval.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "vllm-retrieval.serverCpus" -}}
{{- if and .Values.ray.cluster (le (int .Values.resources.cpus) (int .Values.ray.cpus)) -}}
{{- fail (printf "ray.cpus=%d leaves none of resources.cpus=%d to the server" (int .Values.ray.cpus) (int .Values.resources.cpus)) -}}
{{- end -}}
{{- sub (int .Values.resources.cpus) (ternary (int .Values.ray.cpus) 0 .Values.ray.cluster) -}}
{{- end -}}
