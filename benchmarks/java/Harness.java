import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.io.Reader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Locale;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/**
 * Runs Debezium's engine over a replication slot until it has handed us a number of records as JSON,
 * and prints how long that took. Records are counted and acknowledged, nothing else.
 *
 * <p>Arguments: a file of the engine's properties, the number of records, the most seconds to wait.
 */
public final class Harness implements DebeziumEngine.ChangeConsumer<ChangeEvent<String, String>> {
    private final long wanted;
    private final CountDownLatch done = new CountDownLatch(1);
    private volatile Throwable failure;
    private long records;
    private long characters;
    private long first;
    private volatile long last;

    private Harness(long wanted) {
        this.wanted = wanted;
    }

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        try (Reader reader = Files.newBufferedReader(Path.of(arguments[0]))) {
            properties.load(reader);
        }
        Harness harness = new Harness(Long.parseLong(arguments[1]));
        System.exit(harness.run(properties, Long.parseLong(arguments[2])) ? 0 : 1);
    }

    private boolean run(Properties properties, long seconds) throws Exception {
        ExecutorService executor = Executors.newSingleThreadExecutor();
        DebeziumEngine<ChangeEvent<String, String>> engine =
                DebeziumEngine.create(Json.class)
                        .using(properties)
                        .using(
                                (success, message, error) -> {
                                    if (!success && done.getCount() > 0) {
                                        failure = error != null ? error : new RuntimeException(message);
                                        done.countDown();
                                    }
                                })
                        .notifying(this)
                        .build();
        long begin = System.nanoTime();
        executor.execute(engine);
        boolean ended = done.await(seconds, TimeUnit.SECONDS);
        if (!ended || failure != null) {
            System.err.println(ended ? "failed: " + failure : "no end after " + seconds + " s");
            return false;
        }
        System.out.printf(
                Locale.ROOT,
                "{\"records\": %d, \"characters\": %d, \"from_first_batch\": %.6f, \"from_start\": %.6f,"
                        + " \"engine\": \"%s\"}%n",
                records, characters, (last - first) / 1e9, (last - begin) / 1e9, engine.getClass().getName());
        System.out.flush();
        engine.close();
        executor.shutdown();
        return true;
    }

    @Override
    public void handleBatch(
            List<ChangeEvent<String, String>> batch,
            DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer)
            throws InterruptedException {
        if (first == 0) {
            first = System.nanoTime();
        }
        for (ChangeEvent<String, String> event : batch) {
            String value = event.value();
            // What is no change of a table (a heartbeat, a logical message) is not counted.
            if (event.key() != null && value != null) {
                records++;
                characters += value.length();
            }
            committer.markProcessed(event);
        }
        committer.markBatchFinished();
        if (records >= wanted && done.getCount() > 0) {
            last = System.nanoTime();
            done.countDown();
        }
    }
}
