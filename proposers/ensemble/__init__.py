"""Several proposers as one: the drafts that promise most, as long as they pay."""
