"""Files of a run, packed and kept where its tracker keeps them."""
