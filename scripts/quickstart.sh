#!/usr/bin/env bash
# From a bare clone to a trained and evaluated cell model, on a CPU: installs, draws sample cells, trains a small ViT on
# them without labels, extracts features, and compares kNN on them with the untrained network and a colour histogram.
#
#   bash scripts/quickstart.sh [folder]     # default folder: quickstart
#
# Started again, it resumes where it was stopped. The install takes 2 to 10 minutes, and the rest 3 to 10 on two cores,
# longer where other work slows the machine down. The table of results is printed last.
set -euo pipefail
called_from=$PWD
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${1:-quickstart}
[[ $# -eq 0 || $output == /* ]] || output=$called_from/$output

source scripts/venv.sh requirements.txt
started=$SECONDS

say() { printf '\n== %s\n' "$*"; }

echo "This takes 3 to 10 minutes on two cores; it depends on the machine, and on other work on it."
say "1/3 Drawing sample cells into $output/cells"
python scripts/make_sample_cells.py --output "$output/cells"

# Drawn cells fill more of their images than PBC's, and their slides differ in light far more than the classes do.
say "2/3 Training on the images that $output/cells/lists names, without their labels"
python dinov2/train/train.py \
    --config-file dinov2/configs/train/small_from_scratch.yaml \
    --output-dir "$output" --name run \
    "train.dataset_path=HemaStandardDataset:root=$output/cells/lists:shuffle=1:cache=$output/cells/cache" \
    "evaluation.datasets=[{name: drawn, train: '$output/cells/probe/train', test: '$output/cells/probe/test'}]" \
    train.center_crop=0.65 "augmentation.hema.background_radius=[0.7,1.0]" \
    augmentation.hema.brightness=0.3 augmentation.hema.contrast=0.3 \
    optim.epochs=24 evaluation.eval_period_iterations=160

say "3/3 Features of labelled cells, and kNN on them"
results=$(python dinov2/eval/knn.py \
    --checkpoint "$output/run" \
    --train "$output/cells/probe/train" --test "$output/cells/probe/test" \
    --baseline untrained histogram \
    --output-dir "$output/knn" --overwrite)

say "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
cat <<END
  $output/cells/                  the drawn cells: lists/ to train on, probe/ labelled, patients/ in bags; cache/ decoded
  $output/run/                    config.yaml, training_metrics.json, checkpoints/ to resume from
  $output/run/eval/training_*/    teacher_checkpoint.pth, the network to use, and its kNN along the way
  $output/knn/                    features_train.h5, features_test.h5, results.json

Next: your own images. Write their paths into a .txt file, one a line, and start the same recipe on its folder:

  source .venv/bin/activate
  python dinov2/train/train.py --config-file dinov2/configs/train/small_from_scratch.yaml \\
      train.dataset_path=HemaStandardDataset:root=<folder with the .txt file>:shuffle=1

It keeps the central half of each image's side. If your cells fill the images, add train.center_crop=1.

Results: nearest neighbours (k = 1 and 20) among the features of the trained network ("model"), of the same network
before training ("untrained") and of colour histograms. Test cells are from slides that training never saw.

END
printf '%s\n' "$results"
