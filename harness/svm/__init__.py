"""AMD's SVM architecture as data: VMCB, intercepts, exit codes, MSRs, CPUID."""
