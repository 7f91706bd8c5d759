"""`pointillist COMMAND ...`: every program of the toolkit under one name.

    pointillist                                    # lists the commands
    pointillist synthesize --help
    pointillist pretrain debug --corpus CORPUS     # a config of the toolkit by its name

A command runs its module in this process, as `python -m MODULE` would.
"""

import difflib
import runpy
import sys

# Names, not imports: nothing is loaded before it is needed.
COMMANDS = {
    "synthesize": ("gaussian_tokenizer.synthesize", "make synthetic subjects, as folders or as a corpus"),
    "inspect": ("gaussian_tokenizer.inspect", "describe a file or folder and what is wrong with it"),
    "fit-portrait": ("gaussian_tokenizer.portrait", "find head and camera of a photograph from its landmarks"),
    "fit": ("training.fit_avatars", "fit a Gaussian avatar to every tracked subject of a folder"),
    "build-corpus": ("gaussian_tokenizer.build_corpus", "tokenize avatars into a corpus; stats and validate"),
    "pretrain": ("training.pretrain", "train the autoregressive point model"),
    "train-decoder": ("training.train_gaussian_decoder", "train the Gaussian decoder on a point model"),
    "generate": ("modeling.generate", "generate the points of a portrait"),
    "animate": ("gaussian_tokenizer.animate", "render an avatar in motion, or export it"),
    "app": ("eval.app", "make an avatar from a portrait in the browser"),
    "view": ("eval.viewer", "show avatars in the browser"),
    "bench": ("eval.reenactment_bench", "measure the reenactment of held-out subjects"),
    "metrics": ("eval.metrics", "list the metrics that can be computed on this machine"),
    "train": ("training.recipe", "everything from synthetic subjects to animated avatars, by a recipe"),
    "convert-flame": ("gaussian_tokenizer.flame", "convert a FLAME pickle into a head model file"),
    "convert-x-transformers": ("modeling.convert_x_transformers", "convert weights of an x-transformers decoder"),
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: pointillist COMMAND ...\n\nCommands; pointillist COMMAND --help explains each:")
        for command, (_, summary) in COMMANDS.items():
            print(f"  {command:<24}{summary}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else "pointillist --help lists all"
        sys.exit(f"error: no command {name!r}; {hint}")
    sys.argv[1:] = arguments
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
