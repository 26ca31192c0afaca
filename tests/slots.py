"""A VM of which memory needs no more than slots."""


class IgnoresSlots:
    """Takes slots and does nothing with them."""

    def set_user_memory_region(self, *args, **kwargs):
        pass

    def delete_memory_region(self, slot, as_id=0):
        pass
