"""A virtual machine built on kvm_ioctl: memory, image, vCPUs, console, watchdog."""
