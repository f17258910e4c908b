//! What the documentation shows works as it is shown: specifications pass `hobble check`, and so does every `--fault`.

use std::fs;

use anyhow::{Context, Result, ensure};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::program::workspace;
use hobble_testkit::target::text;

fn pages() -> Result<Vec<(String, String)>> {
    let root = workspace();
    let mut paths = vec![root.join("README.md")];
    for entry in fs::read_dir(root.join("docs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            paths.push(path);
        }
    }
    paths
        .into_iter()
        .map(|path| {
            Ok((
                path.display().to_string(),
                fs::read_to_string(&path).with_context(|| path.display().to_string())?,
            ))
        })
        .collect()
}

#[test]
fn specifications_are_valid() -> Result<()> {
    let hobble = Hobble::new()?;
    let file = hobble.scratch().path().join("spec.yaml");
    let mut seen = 0;
    for (page, content) in pages()? {
        for block in content
            .split("```yaml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next())
        {
            if block.starts_with("version:") {
                fs::write(&file, block)?;
                hobble
                    .run(["check", text(&file)?])
                    .with_context(|| format!("{page}:\n{block}"))?;
                seen += 1;
            }
        }
    }
    ensure!(seen > 0, "no page shows a specification");
    Ok(())
}

#[test]
fn faults_are_valid() -> Result<()> {
    let hobble = Hobble::new()?;
    let mut seen = 0;
    for (page, content) in pages()? {
        for fault in content
            .split("--fault '")
            .skip(1)
            .filter_map(|rest| rest.split('\'').next())
        {
            hobble
                .run(["check", "--fault", fault])
                .with_context(|| format!("{page}: {fault}"))?;
            seen += 1;
        }
    }
    ensure!(seen > 3, "the pages show {seen} faults");
    Ok(())
}
