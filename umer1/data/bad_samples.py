"""What is wrong with a sample: one exception, a fixed list of causes."""

# The fixed order makes counts a vector that ranks can add up.
CAUSES = (
    "missing_file",
    "corrupt_image",
    "too_many_pixels",
    "file_too_large",
    "aspect_ratio",
    "path_escape",
    "marker_mismatch",
    "no_gen_emb",
    "no_disc_emb",
    "over_length",
    "reserved_token",
    "bad_record",
    "empty_response",
    "too_many_frames",
    "frame_sizes",
)


class BadSample(Exception):
    """A sample that cannot be used: `cause` is one of CAUSES, `detail` says what and where."""

    def __init__(self, cause: str, detail: str):
        assert cause in CAUSES, cause
        super().__init__(cause, detail)  # both in args, so that it survives pickling between processes
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"
