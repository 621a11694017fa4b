"""Letters about data sets, their rows and their parts."""

from p2pllm.errors.letter import P2PLLMError


class DatasetFileMissing(P2PLLMError):
    """There is no data file {path}.

    A relative path counts from the folder in which p2pllm was started. Correct it under `data` in
    the configuration, or see what is there: ls {path.parent}
    """


class DatasetUnreadable(P2PLLMError):
    """The data set {where} cannot be read: {why}

    A file needs one JSON object a line. A data set of the hub needs its exact id, a split and a
    configuration that it has, and, where it is gated, a login: hf auth login
    """


class DatasetEmpty(P2PLLMError):
    """The data set {where} has no rows.

    Choose another file under data.source, or another split under data.split.
    """


class ColumnsMissing(P2PLLMError):
    """The data set {where} has no column {missing}. It has: {present}

    Needed are instruction and response (context and category may be there, too), or text.
    Say which column is which under data.columns, for example:

    data:
      columns: {{NAME_IN_THE_DATA_SET: {first_missing}}}
    """


class ColumnNotText(P2PLLMError):
    """The column {column} of the data set {where} holds a {kind}, not text.

    Map a column of text under data.columns, or write the data set out as JSONL with one first.
    """


class AnswerUnknown(P2PLLMError):
    """The data set {where} has ready texts (column {column}), so where an answer begins is unknown.

    Count the loss on whole texts with data.train_on: all, or map the columns of the questions and
    answers to instruction and response under data.columns.
    """


class EvalColumnMissing(P2PLLMError):
    """data.eval_by names the column {column}, which {where} does not have. It has: {present}

    Name one of these, or leave data.eval_by out to hold out single rows.
    """


class HeldOutTooLarge(P2PLLMError):
    """{wanted} rows are to be held out, but there are only {rows} ({unit}), and some must be left.

    Give a smaller data.eval_size, for example 0.1 for a tenth of the rows.
    """


class FewerRowsThanShards(P2PLLMError):
    """The data set {where} leaves {rows} rows to train on, too few for {shards} shards.

    Give a smaller data.shards or a smaller data.eval_size.
    """


class NoRowsLeft(P2PLLMError):
    """None of the {read} rows of {where} can be used: their answers are empty or too long.

    A row, prompt included, may have {length} tokens. Give a larger data.max_length, or keep the
    beginnings of long rows with data.long_rows: truncate
    """


class LabelColumnMissing(P2PLLMError):
    """The data set {where} has no column {column}. It has: {present}

    Name one of these with --by (or --held-out-by), or leave it out.
    """


class LabelColumnUniform(P2PLLMError):
    """Every row of {where} has the same {column}: {value!r}. It cannot make the parts differ.

    Name another column with --by, or make parts of unequal sizes with --sizes-alpha 0.5
    """


class SplitTooFine(P2PLLMError):
    """The data set {where} leaves {rows} rows, too few for {peers} peers.

    Give a smaller --peers or a smaller --held-out.
    """


class SplitExists(P2PLLMError):
    """The folder {folder} is not empty, so no split was written there.

    Name another one with -o, or remove it: rm -r {folder}
    """


class ShardUnusable(P2PLLMError):
    """No row of several shards can be used: their answers are empty or too long.

    Give a larger data.max_length, keep the beginnings of long rows (data.long_rows: truncate), or
    cut the rows into fewer shards than {shards} (data.shards).
    """


class MoreTrainersThanShards(P2PLLMError):
    """All {shards} parts of the run's rows are taken by other trainers, so there is none for you.

    You stay as a spare, follow the run, and take over when a part becomes free. To train now, bring
    rows of your own: p2pllm join --data FILE ...
    A run has room for more trainers with a larger data.shards in its YAML file.
    """


class ChatTemplateMissing(P2PLLMError):
    """data.template is chat, but the tokenizer {tokenizer} has no chat template.

    Choose another one, for example: --set data.template=alpaca
    """


class EndTokenMissing(P2PLLMError):
    """The tokenizer {tokenizer} has no end-of-text token, so the model could not learn to stop.

    Choose a base model whose tokenizer has one, under model.name.
    """
