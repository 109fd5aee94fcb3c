"""The command line: one file per command, which has the command's name, and what commands share.

    start          where the command begins
    main           finds the command, and turns every error into one line
    options        arguments and options of several commands;  loading: models with progress
    console        all that is printed; answer, markdown (markdown_inline, markdown_table), wrapping, painter: how an
                   answer looks at a terminal
    repl           the chat at a terminal: editor, history, interrupts
    conversion     what convert, convert_adapter and convert_calibrated share
    bench_compare, peer_bench; comparison, compare_mixes, compare_plot; against: parts of bench, compare, perplexity
    plot           what commands that draw share; plot_labels
    docs           writes the generated parts of the documentation
"""

TYPE_CHECKING = False  # `typing` takes longer to import than all that is needed here

if TYPE_CHECKING:  # `main` imports commands by name: those who pack apps see here which there are
    from qrun.cli import (  # noqa: F401
        bench,
        chat,
        compare,
        completion,
        convert,
        embed,
        imatrix,
        info,
        list,
        pack,
        perplexity,
        pull,
        rm,
        run,
        serve,
        tokenize,
        warmup,
    )
