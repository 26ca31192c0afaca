"""vmcb12 field by field: what VMRUN and KVM_SET_NESTED_STATE take of it, value by value."""
