from kvm_deadline import deadline_of_each

deadline = deadline_of_each(120)
