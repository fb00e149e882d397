#!/bin/sh
# The entrypoint of a RayJob: runs `diffsmooth certify`, and turns exit status 2 (a user error, which a retry cannot
# fix) into 0 with a message.
#
# KubeRay's backoffLimit retries every job with a nonzero exit status and cannot exclude a status: submitterConfig has
# only a backoffLimit, and the podFailurePolicy of a Kubernetes Job sees the status of the submitter, which is 1 for
# every failed job. This script therefore decides: 1 (incomplete, lost head node) and 143 (stopped by SIGTERM) are
# returned unchanged, so KubeRay retries the job, which resumes the run.
trap : TERM # certify receives its own SIGTERM and finishes the blocks in progress; the script returns its status
diffsmooth certify "$@"
status=$?
if [ "$status" -eq 2 ]; then
    echo "diffsmooth: NOT CERTIFIED; fix the error above. The exit status is 0 so that the job is not retried" >&2
    exit 0
fi
exit "$status"
