{{/* The pod: of a Deployment, or of the head of a RayCluster, whose own container comes first. */}}
{{- define "vllm-retrieval.pod" -}}
{{- if and (gt (int .Values.gpus) 0) (ne (int .Values.gpus) (int .Values.tensorParallel)) -}}
{{- fail (printf "gpus=%d is not tensorParallel=%d: each rank has a GPU of its own" (int .Values.gpus) (int .Values.tensorParallel)) -}}
{{- end -}}
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
# preStop, running requests, and what ends afterwards.
terminationGracePeriodSeconds: {{ add .Values.shutdownTimeoutSeconds 40 }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 2000
  runAsGroup: 2000
  fsGroup: 2000
  seccompProfile: {type: RuntimeDefault}
{{- if .Values.ray.cluster }}
# Ray's workers map the server's memory through /proc.
shareProcessNamespace: true
{{- end }}
containers:
  {{- if .Values.ray.cluster }}
  # KubeRay puts `ray start --head` into the first container. /tmp and /dev/shm hold Ray's sockets and store.
  - name: ray
    image: {{ include "vllm-retrieval.image" . | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    env:
      - {name: HOME, value: /tmp}
      - {name: VLLM_RETRIEVAL_CACHE, value: /cache}
      # Ray would end workers when memory runs short; the server's memory that they map counts against them.
      - {name: RAY_memory_monitor_refresh_ms, value: "0"}
      {{- include "vllm-retrieval.rayEnv" . | nindent 6 }}
    resources:
      requests: &ray
        cpu: {{ .Values.ray.cpus }}
        memory: {{ .Values.ray.memoryGi }}Gi
      limits: *ray
    securityContext: {{- include "vllm-retrieval.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: shm, mountPath: /dev/shm}
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /cache}
  {{- end }}
  - name: vllm
    image: {{ include "vllm-retrieval.image" . | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args:
      - {{ .Values.model | quote }}
      - --attention-backend=retrieval
      - {{ printf "--additional-config=%s" (include "vllm-retrieval.knobs" .) | quote }}
      - --max-model-len={{ int .Values.maxModelLen }}
      - --tensor-parallel-size={{ int .Values.tensorParallel }}
      - --port=8000
      - --shutdown-timeout={{ int .Values.shutdownTimeoutSeconds }}
      {{- with .Values.servedModelName }}
      - --served-model-name={{ . }}
      {{- end }}
      {{- range .Values.args }}
      - {{ . | quote }}
      {{- end }}
    env:
      - {name: VLLM_PLUGINS, value: retrieval}
      - {name: HOME, value: /tmp}
      - {name: VLLM_RETRIEVAL_CACHE, value: /cache}
      - {name: HF_HOME, value: /cache/huggingface}
      - {name: VLLM_CACHE_ROOT, value: /cache/vllm}
      {{- if .Values.ray.cluster }}
      {{- include "vllm-retrieval.rayEnv" . | nindent 6 }}
      {{- end }}
      {{- range $name, $value := .Values.env }}
      - {name: {{ $name }}, value: {{ $value | quote }}}
      {{- end }}
      {{- if .Values.keys.view }}
      - {name: RETRIEVAL_VIEW_KEY_FILE, value: /keys/view/key}
      {{- end }}
      {{- if .Values.keys.admin }}
      - {name: RETRIEVAL_ADMIN_KEY_FILE, value: /keys/admin/key}
      {{- end }}
      {{- with .Values.keys.api }}
      - name: VLLM_API_KEY
        valueFrom: {secretKeyRef: {name: {{ . }}, key: key}}
      {{- end }}
      {{- with .Values.keys.huggingFace }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ . }}, key: key}}
      {{- end }}
    ports:
      - {name: http, containerPort: 8000}
    # A model may take long to come; afterwards the engine answers within a step.
    startupProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 10
      failureThreshold: 180
    livenessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 15
      timeoutSeconds: 10
      failureThreshold: 6
    readinessProbe:
      httpGet: {path: /retrieval/ready, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
    lifecycle:
      # Until endpoints have heard; vLLM then ends what runs, and answers 503 to what still comes.
      preStop: {exec: {command: ["sleep", "10"]}}
    resources:
      requests: &resources
        cpu: {{ include "vllm-retrieval.serverCpus" . }}
        memory: {{ include "vllm-retrieval.memoryGi" . }}Gi
        {{- if gt (int .Values.gpus) 0 }}
        {{ .Values.gpuResource }}: {{ int .Values.gpus }}
        {{- end }}
      limits: *resources
    securityContext: {{- include "vllm-retrieval.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: shm, mountPath: /dev/shm}
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /cache}
      {{- range $name := list "view" "admin" }}
      {{- if index $.Values.keys $name }}
      - {name: key-{{ $name }}, mountPath: /keys/{{ $name }}, readOnly: true}
      {{- end }}
      {{- end }}
volumes:
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.resources.shmGi }}Gi}
  - name: tmp
    emptyDir: {sizeLimit: 10Gi}
  - name: cache
    {{- if .Values.cache.claim }}
    persistentVolumeClaim: {claimName: {{ .Values.cache.claim }}}
    {{- else }}
    emptyDir: {sizeLimit: {{ .Values.cache.sizeGi }}Gi}
    {{- end }}
  {{- range $name := list "view" "admin" }}
  {{- with index $.Values.keys $name }}
  - name: key-{{ $name }}
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
